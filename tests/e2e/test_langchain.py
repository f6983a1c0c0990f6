"""LangChain's standard tests of a chat model, against the proxy in front of an emulated engine.

Marked as failing are those that want a model which understands what it is asked: the emulated one writes about
harbours, and calls a tool with the least arguments that its schema allows.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

from proxy.config import Config
from proxy.serve import Service
from sim.emulator import EmulatorSettings, emulator
from tests.e2e.proxy_fixtures import settings

pytestmark = pytest.mark.e2e

NO_UNDERSTANDING = "the emulated model does not understand what it is asked"
TEXT_ONLY = "the emulated model reads text only"


def unanswerable(reason: str) -> Any:
    """A standard test that LangChain would skip for such a model."""

    @pytest.mark.xfail(reason=reason)
    def test(self: ChatModelIntegrationTests) -> None:
        pytest.fail(reason)

    return test


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The base URL of a proxy in a thread of its own: these tests block the loop that they run on."""
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    ready: asyncio.Future[str] = loop.create_future()

    async def serve() -> None:
        text = EmulatorSettings(models=("m",), speed=100, shutdown_timeout_s=0.1)
        vectors = EmulatorSettings(models=("vectors",), speed=100, shutdown_timeout_s=0.1, pooling=True)
        async with emulator(text) as engine, emulator(vectors) as pooling:
            backends: list[dict[str, Any]] = [
                {"url": engine.url},
                {"url": pooling.url, "models": ["vectors"]},
            ]
            service = Service(Config.model_validate(settings(folder, *backends)))
            await service.start()
            ready.set_result(f"http://{service.ports.listen}/v1")
            await stop.wait()
            await service.stop()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()

    async def address() -> str:
        return await ready

    try:
        yield asyncio.run_coroutine_threadsafe(address(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(tmp_path_factory.mktemp("state")) as url:
        yield url


OPTIONS: dict[str, Any] = {
    "api_key": "none",
    "max_retries": 0,
    # Its clients outlive the loop of a test; their connections must not.
    "default_headers": {"connection": "close"},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # LangChain's own, of schemas and serialising
class TestChatOpenAI(ChatModelIntegrationTests):
    """As LangChain has them."""

    base_url = ""

    @pytest.fixture(autouse=True)
    def _serve(self, base_url: str) -> None:
        type(self).base_url = base_url

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"base_url": self.base_url, "model": "m", "stream_usage": True, **OPTIONS}

    @property
    def supports_model_override(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "m"

    test_image_inputs = unanswerable(TEXT_ONLY)
    test_image_tool_message = unanswerable(TEXT_ONLY)
    test_pdf_inputs = unanswerable(TEXT_ONLY)
    test_pdf_tool_message = unanswerable(TEXT_ONLY)
    test_audio_inputs = unanswerable(TEXT_ONLY)
    test_anthropic_inputs = unanswerable("parts of Anthropic's messages belong to another endpoint")
    test_json_mode = unanswerable(NO_UNDERSTANDING)
    test_stream_time = unanswerable("it compares with a recording, of which there is none")

    @pytest.mark.xfail(reason=NO_UNDERSTANDING)
    def test_tool_calling(self, model: BaseChatModel) -> None:
        super().test_tool_calling(model)

    @pytest.mark.xfail(reason=NO_UNDERSTANDING)
    async def test_tool_calling_async(self, model: BaseChatModel) -> None:
        await super().test_tool_calling_async(model)

    @pytest.mark.xfail(reason=NO_UNDERSTANDING)
    def test_bind_runnables_as_tools(self, model: BaseChatModel) -> None:
        super().test_bind_runnables_as_tools(model)

    @pytest.mark.xfail(reason=NO_UNDERSTANDING)
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(reason=NO_UNDERSTANDING)
    def test_unicode_tool_call_integration(self, model: BaseChatModel, **options: Any) -> None:
        super().test_unicode_tool_call_integration(model, **options)


class TestOpenAIEmbeddings(EmbeddingsIntegrationTests):
    """As LangChain has them."""

    base_url = ""

    @pytest.fixture(autouse=True)
    def _serve(self, base_url: str) -> None:
        type(self).base_url = base_url

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        # Without a tokenizer of OpenAI's, which would be loaded from the network.
        return {"base_url": self.base_url, "model": "vectors", "check_embedding_ctx_length": False, **OPTIONS}
