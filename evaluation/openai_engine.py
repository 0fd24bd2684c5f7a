"""Any server with OpenAI's chat API and vLLM's extras, such as `vllm serve`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

from engines import Chat, Job, Settings, package_versions
from generations import Generation
from questions import UserError


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
            raise UserError(
                f"The server at {self.settings.base_url} does not answer ({error}): start it, or change --base-url."
            ) from error
        for name in (self.settings.model, *self.settings.adapters):
            if name not in served:
                raise UserError(f"The server serves {', '.join(served)}, not {name}: write one of these.")
        return package_versions("openai")

    def _client(self) -> Any:
        from openai import OpenAI

        key = os.environ.get("OPENAI_API_KEY", "none")
        return OpenAI(base_url=self.settings.base_url, api_key=key, max_retries=5, timeout=3600)

    def generate(self, jobs: list[Job]) -> Iterator[tuple[Job, Generation]]:
        from openai import OpenAIError

        client = self._client()  # retries with exponential back-off by itself
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            futures = {pool.submit(self._ask, client, job): job for job in jobs}
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
        if failure is not None:
            raise UserError(
                f"The server at {self.settings.base_url} failed ({failure}): what it answered is kept, and the same "
                "command goes on from there."
            ) from failure

    def _ask(self, client: Any, job: Job) -> Generation:
        sampling = self.settings.sampling
        answer = client.chat.completions.create(
            model=job.run if job.run in self.settings.adapters else self.settings.model,
            messages=job.messages,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            extra_body={"repetition_penalty": sampling.repetition_penalty, "return_token_ids": True},
        ).choices[0]
        ids = getattr(answer, "token_ids", None)
        return Generation(job.index, answer.message.content or "", ids, answer.finish_reason)
