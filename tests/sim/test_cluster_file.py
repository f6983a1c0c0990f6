"""Cluster files: what is left out comes from the profile, mistakes are named where they stand."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from policies.yamlfile import FileProblems
from sim.cluster_file import ClusterFile, read_cluster
from sim.profile import load_profile
from tests.pages import ROOT

HEAD = "model: m\nsla: {ttft: 2s, tpot: 100ms}\n"
APPLIANCE = "  - {name: a, profile: l40-2-32b}\n"


def read(tmp_path: Path, text: str) -> ClusterFile:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return read_cluster(file)


def problem(tmp_path: Path, text: str) -> str:
    with pytest.raises(FileProblems) as caught:
        read(tmp_path, text)
    return str(caught.value).partition("cluster.yaml:")[2].partition("\n")[0]


def test_the_example_is_a_local_and_three_remote_sites() -> None:
    cluster = read_cluster(ROOT / "examples" / "cluster.yaml")
    rtts = {one.section.site: one.section.rtt for one in cluster.backends}
    assert rtts == {"local": 0.0, "suzhou": 0.005, "guiyang": 0.045, "frankfurt": 0.3}
    assert len({one.profile.name for one in cluster.backends}) == 4
    assert all(one.section.context for one in cluster.backends)
    assert [one.name for one in cluster.backends][1:3] == ["suzhou-1", "suzhou-2"]
    assert len({member.backend.name for member in cluster.members(512)}) == 5


def test_what_is_left_out_is_as_the_profile_says(tmp_path: Path) -> None:
    profile = load_profile("l40-2-32b")
    (member,) = read(tmp_path, f"{HEAD}backends:\n{APPLIANCE}").members(512)
    assert profile.capacity is not None
    assert member.backend.slots == profile.capacity.users
    assert member.backend.context_tokens == {"m": profile.limits.max_model_len}
    assert member.backend.data_classes is None
    assert member.settings.prefix_unit_tokens == 0  # of a profile without a prefix cache
    assert (member.rtt, member.backend.price_output) == (0, None)


def test_what_is_said_is_taken(tmp_path: Path) -> None:
    cluster = read(
        tmp_path,
        f"""{HEAD}
backends:
  - name: far
    site: there
    profile: l40-2-32b
    slots: 7
    rtt: 30ms
    context: 9000
    prefix_cache: true
    weight: 3
    bandwidth: 1MB
    watts: 500
    labels: {{card: l40}}
    price: {{input: 0.5, output: 2, currency: CNY}}
sites:
  there: {{operator: o, location: [1, 2], carbon_gco2_kwh: 100, labels: {{zone: z}}, data_classes: [internal]}}
""",
    )
    (member,) = cluster.members(512)
    backend = member.backend
    assert (backend.slots, member.rtt, backend.context_tokens) == (7, 30_000, {"m": 9000})
    assert (backend.weight, backend.bandwidth, backend.site, backend.operator) == (3, 1e6, "there", "o")
    assert backend.labels == {"zone": "z", "card": "l40"}
    assert backend.data_classes == {"internal"}
    assert (backend.price_input, backend.price_output, backend.carbon_gco2_kwh) == (0.5, 2.0, 100.0)
    assert member.settings.prefix_unit_tokens == 512
    assert (cluster.currency, cluster.backends[0].watts) == ("CNY", 500.0)
    assert cluster.known.all_sites == {"local", "there"}


def test_a_remote_site_that_says_nothing_may_see_public_data_only(tmp_path: Path) -> None:
    text = f"{HEAD}backends:\n  - {{name: a, site: x, profile: l40-2-32b}}\nsites: {{x: {{}}}}\n"
    assert read(tmp_path, text).members(0)[0].backend.data_classes == {"public"}


def test_members_are_new_each_time_and_the_file_can_be_sent_to_a_process(tmp_path: Path) -> None:
    cluster = read(tmp_path, f"{HEAD}backends:\n{APPLIANCE}")
    one, two = cluster.members(0)[0], cluster.members(0)[0]
    assert one.backend is not two.backend
    assert pickle.loads(pickle.dumps(cluster)) == cluster


def test_a_profile_may_be_a_file_beside_the_cluster(tmp_path: Path) -> None:
    source = ROOT / "sim" / "profiles" / "l40-2-32b.yaml"
    (tmp_path / "mine.yaml").write_text(source.read_text().replace("name: l40-2-32b", "name: mine"))
    text = f"{HEAD}backends:\n  - {{name: a, profile: mine.yaml}}\n"
    assert read(tmp_path, text).backends[0].profile.name == "mine"


A = "{name: a, profile: l40-2-32b"
PRICED = "profile: l40-2-32b, price: {input: 1, output: 1"


@pytest.mark.parametrize(
    ("backends", "said"),
    [
        (" []", "3:11: backends:"),
        ("{name: a, profile: l40-2-33b}", "4:24: backends[0].profile: no profile is called 'l40-2-33b'"),
        ("{name: a, profile: l40-2-33b}", "(did you mean 'l40-2-32b'?)"),
        ("{name: a, profile: gone.yaml}", "gone.yaml: no such file"),
        (f"{A}}}\n  - {A}}}", "5:12: backends[1].name: two backends are called 'a'"),
        (f"{A}, rrt: 3ms}}", "(did you mean 'rtt'?)"),
        (f"{A}, rtt: fast}}", "4:40: backends[0].rtt: expected a duration"),
        (
            f"{A}, count: 2}}\n  - {{name: a-2, profile: x}}",
            "5:12: backends[1].name: two backends are called 'a-2'",
        ),
        (f"{A}, site: nj}}\nsites: {{nn: {{}}}}", "4:41: backends[0].site: no site is called 'nj'"),
        (f"{A}, context: 9000000}}", "4:44: backends[0].context: a context of 9000000 tokens does not fit"),
        (f"{A}, site: remote}}", "in policy files 'remote' means every site"),
        (f"{A}, price: {{input: -1, output: 1}}}}", "backends[0].price.input"),
        (
            f"{{name: a, {PRICED}}}}}\n  - {{name: b, {PRICED}, currency: CNY}}}}",
            "5:42: backends[1].price: one cluster has one currency: it is USD, and here CNY",
        ),
        (f"{A}}}\nsites: {{x: {{location: [91, 0]}}}}", "latitude lies between -90 and 90"),
    ],
)
def test_what_is_wrong_is_named_where_it_stands(tmp_path: Path, backends: str, said: str) -> None:
    start = "backends:" if backends == " []" else "backends:\n  - "
    assert said in problem(tmp_path, f"{HEAD}{start}{backends}\n")


def test_the_service_level_has_to_be_given(tmp_path: Path) -> None:
    assert "1:1: sla: this key is required" in problem(tmp_path, f"model: m\nbackends:\n{APPLIANCE}")
    assert "sla.ttft" in problem(tmp_path, HEAD.replace("2s", "0s") + f"backends:\n{APPLIANCE}")


def test_a_configuration_of_the_proxy_is_called_one(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "tidegate.yaml").read_text()
    with pytest.raises(
        FileProblems, match=r"backends\[0\]\.url: this is a configuration of the proxy"
    ) as found:
        read(tmp_path, text)
    assert len(found.value.problems) == 1
    with pytest.raises(FileProblems, match="url: unknown key"):
        read(tmp_path, f"{HEAD}backends: [{A}, url: 'http://x'}}]")


def test_slots_that_nobody_knows_have_to_be_given(tmp_path: Path) -> None:
    source = (ROOT / "sim" / "profiles" / "l40-2-32b.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(source[: source.index("capacity:")])
    said = problem(tmp_path, f"{HEAD}backends:\n  - {{name: a, profile: mine.yaml}}\n")
    assert "give `slots` as a number" in said


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(b"model: m\n\xff\n")
    with pytest.raises(FileProblems, match=r"cluster\.yaml:2:1: the file is not UTF-8 text"):
        read_cluster(file)
