"""Two minutes of what users do: streams, repeated questions, shared prefixes, mistakes, cancels, a batch."""

import asyncio
import json
import time

import httpx
import openai

SYSTEM = "You are a patient assistant who answers questions about history, physics and cooking. " * 40


class Load:
    """Asks until its time is over. `asked` counts requests that the gateway had to decide on."""

    def __init__(self, base: str, key: str, model: str) -> None:
        self.base, self.key, self.model = base, key, model
        self.asked = self.failed = 0

    async def run(self, seconds: float, streams: int = 3) -> None:
        until = time.monotonic() + seconds
        async with openai.AsyncOpenAI(base_url=self.base + "/v1", api_key=self.key, timeout=120, max_retries=0) as sdk:
            await asyncio.gather(*(self._user(sdk, number, until) for number in range(streams)), self._odd(until))

    async def _user(self, sdk: openai.AsyncOpenAI, number: int, until: float) -> None:
        turn = 0
        while time.monotonic() < until:
            turn += 1
            self.asked += 1
            try:
                parts = await sdk.chat.completions.create(
                    model=self.model, stream=True, max_tokens=24, temperature=0.8,
                    messages=[{"role": "system", "content": SYSTEM},
                              {"role": "user", "content": f"Question {number}.{turn}: what is {turn} + {number}?"}])
                async for _ in parts:
                    pass
            except openai.APIError:
                self.failed += 1
            await asyncio.sleep(0.2)

    async def _odd(self, until: float) -> None:
        headers = {"authorization": f"Bearer {self.key}"}
        async with httpx.AsyncClient(base_url=self.base, headers=headers, timeout=60) as http:
            while time.monotonic() < until:
                same = {"model": self.model, "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 8,
                        "temperature": 0}
                await http.post("/v1/chat/completions", json=same)
                await http.post("/v1/chat/completions", json=same)
                await http.post("/v1/chat/completions", json={"model": "no-such-model", "messages": []})
                self.asked += 3
                long = {"model": self.model, "prompt": "Once upon a time", "max_tokens": 300, "stream": True}
                self.asked += 1
                async with http.stream("POST", "/v1/completions", json=long) as answer:
                    async for _ in answer.aiter_bytes():
                        break  # the client leaves
                await asyncio.sleep(2)


def start_batch(sdk: openai.OpenAI, model: str, lines: int = 20) -> str:
    """A small batch; its id."""
    rows = [json.dumps({
        "custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions",
        "body": {"model": model, "messages": [{"role": "user", "content": f"Count to {number}."}], "max_tokens": 8},
    }) for number in range(lines)]
    file = sdk.files.create(file=("batch.jsonl", "\n".join(rows).encode()), purpose="batch")
    return sdk.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h").id
