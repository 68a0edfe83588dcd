"""MT-Bench's 80 questions (LMSYS, Apache-2.0): text that people wrote, where filler would not do.

A second turn contains the first, as a chat client sends it, with filler where the first answer would stand:
a plan is made before there are answers. It follows a few requests later, in the session of its first turn.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Literal

from loadtest.errors import LoadtestError
from loadtest.workloads.draft import Draft, Setting, Workload
from loadtest.workloads.lengths import Lengths
from loadtest.workloads.text import prose_cut, prose_tokens

# Conversations that are between their two turns at any time.
_OPEN_CONVERSATIONS = 4


class MtBenchWorkload(Workload):
    """The questions in a shuffled order, a different one each time round."""

    kind: Literal["mt_bench"]
    file: str = "mt_bench_question.jsonl"
    output_tokens: Lengths
    turns: Literal[1, 2] = 1

    def drafts(self, setting: Setting) -> Iterator[Draft]:
        """Endless. Raises LoadtestError with file and line for a line that is no question."""
        questions = self._questions(setting)
        rng = setting.rng("mt_bench")
        waiting: deque[Draft] = deque()
        conversation = 0
        while True:
            for first, second in rng.sample(questions, len(questions)):
                session = f"mt-bench-{setting.seed}-{conversation}" if self.turns > 1 else None
                conversation += 1
                answer_tokens = self.output_tokens.draw(rng)
                yield _draft(first, answer_tokens, session)
                if self.turns == 1:
                    continue
                answer = setting.text(f"mt_bench/{conversation}", answer_tokens)
                waiting.append(_draft(f"{first}\n\n{answer}\n\n{second}", self.output_tokens.draw(rng), session))
                if len(waiting) > _OPEN_CONVERSATIONS:
                    yield waiting.popleft()

    def _questions(self, setting: Setting) -> list[tuple[str, str]]:
        path = setting.file(self.file)
        questions = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                first, second = json.loads(line)["turns"]
                questions.append((str(first), str(second)))
            except (KeyError, TypeError, ValueError) as error:
                raise LoadtestError(f"{path}:{number}: not a question with two turns: {error!r}") from error
        if not questions:
            raise LoadtestError(f"{path}: holds no question")
        return questions


def _draft(prompt: str, output_tokens: int, session: str | None) -> Draft:
    return Draft(
        at_s=None,
        prompt_tokens=prose_tokens(prompt),
        output_tokens=output_tokens,
        write=partial(prose_cut, prompt),
        session=session,
    )
