"""`tidegate bench`: what an OpenAI-compatible server can do, by concurrency: the white paper's chapter 3.

For each concurrency so many users are in a closed loop: each sends its next request when the answer to the one
before is whole. They share one pool of requests, so it is also an infinite request rate under a limit of requests
in flight, as `vllm bench serve --request-rate inf --max-concurrency`. The figures are defined as there:

* TTFT: from just before a request is sent to its first token (the headers of a stream are none);
* TPOT: (last token - first token) / (output tokens - 1), for answers of two tokens and more;
* end to end: to the last token;
* output throughput: output tokens of all complete answers / time from the first request to the last answer.

Tokens are those that the server reports; one event may bring several. An answer that is not whole, or comes
without a report, is an error, and errors are counted.
"""
