"""Any server with OpenAI's chat API and vLLM's extras, such as `vllm serve`."""

from __future__ import annotations

import os
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

from engines import Chat, Job, Settings, package_versions
from generations import Generation
from questions import UserError

# What a server says of one request, not of all: too long a prompt, or content that it does not take.
REFUSED = (400, 413, 422)


class OpenAIEngine:
    """Any server with the chat API, such as `vllm serve`; adapters are models that it serves by their names."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check(self, chats: list[Chat]) -> None:
        """The server knows its model's context and template, and says so."""

    def versions(self) -> dict[str, str]:
        from openai import OpenAIError

        try:
            served = [model.id for model in self._client().models.list()]
        except OpenAIError as error:
            raise UserError(self._sentence(error)) from error
        for name in (self.settings.model, *self.settings.adapters):
            if name not in served:
                raise UserError(f"The server serves {', '.join(served)}, not {name}: write one of these.")
        return package_versions("openai")

    def _client(self) -> Any:
        """A client that asks again, with growing pauses, what may pass: 408, 409, 429, 5xx and lost connections."""
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY", "none")
        return OpenAI(base_url=self.settings.base_url, api_key=key, max_retries=5, timeout=3600)

    def generate(self, jobs: list[Job]) -> Generator[tuple[Job, Generation]]:
        from openai import OpenAIError

        client = self._client()
        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            futures = {pool.submit(self._reply, client, job): job for job in jobs}
            failure: OpenAIError | None = None
            pending = set(futures)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    try:
                        reply = future.result()
                    except OpenAIError as error:
                        failure = failure or error
                    else:
                        yield futures[future], reply
                if failure is not None:  # ask no more, but keep what is under way
                    pending = {future for future in pending if not future.cancel()}
        finally:
            pool.shutdown(cancel_futures=True)  # also if nobody wants the rest
        if failure is not None:
            raise UserError(self._sentence(failure)) from failure

    def _reply(self, client: Any, job: Job) -> Generation:
        from openai import APIStatusError

        try:
            return self._ask(client, job)
        except APIStatusError as error:
            if error.status_code not in REFUSED:
                raise
            return Generation(job.index, "", None, None, refused=str(error))

    def _ask(self, client: Any, job: Job) -> Generation:
        sampling = self.settings.sampling
        answer = first_choice(
            client.chat.completions.create(
                model=job.run if job.run in self.settings.adapters else self.settings.model,
                messages=job.messages,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=sampling.seed,
                extra_body={"repetition_penalty": sampling.repetition_penalty, "return_token_ids": True},
            )
        )
        ids = getattr(answer, "token_ids", None)
        return Generation(job.index, answer.message.content or "", ids, answer.finish_reason)

    def _sentence(self, error: Exception) -> str:
        """What happened and what to do, by what is wrong: the key, the name or address, or the server."""
        url, status = self.settings.base_url, getattr(error, "status_code", None)
        if status in (401, 403):
            return f"The server at {url} refuses the key ({error}): set OPENAI_API_KEY to one that may use this model."
        if status == 404:
            return f"The server at {url} does not know what it is asked for ({error}): correct the model or --base-url."
        if status is None or status in (408, 409, 429) or status >= 500:
            return (
                f"The server at {url} does not answer ({error}): start it, wait, or change --base-url; what it "
                "answered is kept, and the same command goes on from there."
            )
        return f"The server at {url} refuses to answer ({error}): see to that; the same command goes on from there."


def first_choice(reply: Any) -> Any:
    """A reply's answer.

    Raises:
        OpenAIError: if it holds none, as where a server reports an error of its own with status 200.
    """
    from openai import OpenAIError

    if not getattr(reply, "choices", None):
        raise OpenAIError(f"its reply holds no answer: {str(reply)[:500]}")
    return reply.choices[0]
