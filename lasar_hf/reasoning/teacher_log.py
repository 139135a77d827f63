"""The answers of a teacher that is asked over a network, one JSON line each, so that no answer is paid for twice."""

import json
import os
from pathlib import Path


class TeacherLog:
    """
    Append-only log, read back on opening. Each line is forced to the disk before its answer counts as known. A last
    line without line end, which a killed run may leave, is dropped. A rejection cancels an earlier acceptance.

    Args:
        path (`str` or `Path`):
            The JSON-lines file; created with its folder if missing.

    Attributes:
        chains (`dict[str, str]`):
            Accepted answer of each request.
        refusals (`dict[str, list[str]]`):
            Why the answers to a request were refused, in order.
        tokens (`dict[str, tuple[int, int]]`):
            Prompt and completion tokens of all answers to a request, as the endpoint counted them.

    Raises:
        ValueError: a line that is no answer; names the file and the line.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.chains: dict[str, str] = {}
        self.refusals: dict[str, list[str]] = {}
        self.tokens: dict[str, tuple[int, int]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            self._take(line, number)
            end += len(line)
        self._file.truncate(end)

    def __enter__(self) -> "TeacherLog":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, key: str, chain: str, refused: str | None, prompt_tokens: int, completion_tokens: int) -> None:
        """
        Write one answer and keep it.

        Args:
            key (`str`):
                Hash of the request.
            chain (`str`):
                The answer; not written when it is refused.
            refused (`str`, *optional*):
                Why it is refused.
            prompt_tokens, completion_tokens (`int`):
                What the endpoint counted.
        """
        answer = {"key": key, "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        answer |= {"chain": chain} if refused is None else {"refused": refused}
        line = json.dumps(answer).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._take(line, 0)

    def _take(self, line: bytes, number: int) -> None:
        try:
            answer = json.loads(line)
            key = answer["key"]
            sent, got = max(0, answer["prompt_tokens"]), max(0, answer["completion_tokens"])
            if not isinstance(key, str) or not isinstance(answer.get("chain", ""), str):
                raise TypeError("no text")
            before = self.tokens.get(key, (0, 0))
            self.tokens[key] = before[0] + sent, before[1] + got
            if "chain" in answer:
                self.chains[key] = answer["chain"]
            else:
                self.refusals.setdefault(key, []).append(answer["refused"])
                self.chains.pop(key, None)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"{self.path}: line {number} is no answer of a teacher; remove it.") from error
