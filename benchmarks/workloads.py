"""The work: lengths of prompts and answers, and the seeded text that fills the prompts.

A prompt of N tokens is N words of the lists in `words.py`: 1.0006 tokens an English word, measured with Qwen3's and
SmolLM2's tokenizers. The server's chat template comes on top.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from random import Random
from typing import Protocol

import orjson

from benchmarks import quotes
from benchmarks.words import LANGUAGES, Language

Law = Callable[[Random], int]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Job:
    """One request to be sent. `serial` is unique in a run; lengths are in tokens, the prompt's by the law.

    `conversation` is a name that all of its turns have; None where each request stands alone.
    """

    serial: int
    messages: tuple[Message, ...]
    prompt_tokens: int
    max_tokens: int
    conversation: str | None = None


class Source(Protocol):
    """Where jobs come from."""

    def draw(self, count: int, *, seed: int, first: int = 0) -> list[Job]:
        """`count` jobs with serials from `first` on; the same for the same arguments."""
        ...


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes one job's text: all that it writes depends on the seed and the job's serial."""

    language: Language
    seed: int
    serial: int

    def distinct(self, words: int) -> str:
        """The serial number, then this many words: no two jobs' texts start alike, so a prefix cache finds nothing."""
        return f"{self.serial}. {self._written(f'{self.seed}/{self.serial}', words)}"

    def constant(self, title: str, words: int) -> str:
        """This many words, the same in every job with this seed."""
        return self._written(f"{self.seed}/{title}", words)

    def words(self, title: str, words: int) -> str:
        """This many words of this job's own."""
        return self._written(f"{self.seed}/{self.serial}/{title}", words)

    def _written(self, seed: str, words: int) -> str:
        return self.language.space.join(Random(seed).choices(self.language.words, k=words))


Shape = Callable[[Writer, int], tuple[Message, ...]]


def question(writer: Writer, words: int) -> tuple[Message, ...]:
    """One message, distinct from its first word."""
    return ({"role": "user", "content": writer.distinct(words)},)


INSTRUCTION, CITATION_GUIDE, CHUNKS, CHUNK, ASKED = 75, 1543, 6, 526, 30


def retrieval_chat(writer: Writer, words: int) -> tuple[Message, ...]:
    """RAGFlow's chat: an instruction, six chunks of up to 512 words with id and title, the constant citation guide
    after them, then history and question. Two prompts share the instruction alone.

    Raises ValueError for fewer words than instruction, guide and question take.
    """
    room = words - INSTRUCTION - CITATION_GUIDE - ASKED
    if room < CHUNKS:
        raise ValueError(f"a retrieval chat has at least {words - room + CHUNKS} tokens of prompt, not {words}")
    size = min(CHUNK, room // CHUNKS)
    chunks = [writer.distinct(size), *(writer.words(f"chunk {number}", size) for number in range(1, CHUNKS))]
    system = [writer.constant("instruction", INSTRUCTION), *chunks, writer.constant("citations", CITATION_GUIDE)]
    asked = writer.words("question", ASKED + room - CHUNKS * size)
    return ({"role": "system", "content": "\n\n".join(system)}, {"role": "user", "content": asked})


EXTRACTION_GUIDE = 2226


def extraction(writer: Writer, words: int) -> tuple[Message, ...]:
    """GraphRAG's extraction: a long constant guide with examples, then one chunk of a document.

    Raises ValueError for no words beyond the guide.
    """
    if words <= EXTRACTION_GUIDE:
        raise ValueError(f"an extraction has more than {EXTRACTION_GUIDE} tokens of prompt, not {words}")
    guide, chunk = writer.constant("extraction", EXTRACTION_GUIDE), writer.distinct(words - EXTRACTION_GUIDE)
    return ({"role": "system", "content": guide}, {"role": "user", "content": chunk})


TURNS, CONVERSATIONS, REPLY = 4, 256, 64


def conversation(writer: Writer, words: int) -> tuple[Message, ...]:
    """A turn of a chat about a text: what was said before, and a question. `words` are those of its first turn.

    256 chats go on at once, turn by turn: 255 requests lie between two turns of one chat. Earlier answers are made up,
    so a prefix cache finds the prompt of the turn before, but not the answer to it.
    """
    chat, turn = chat_and_turn(writer.serial)
    of_chat = replace(writer, serial=chat)
    text = of_chat.distinct(words - INSTRUCTION - ASKED)
    messages: list[Message] = [{"role": "system", "content": writer.constant("instruction", INSTRUCTION)}]
    for earlier in range(turn + 1):
        asked = of_chat.words(f"question {earlier}", ASKED)
        messages.append({"role": "user", "content": asked if earlier else f"{text}\n\n{asked}"})
        messages.append({"role": "assistant", "content": of_chat.words(f"reply {earlier}", REPLY)})
    return tuple(messages[:-1])


def chat_and_turn(serial: int) -> tuple[int, int]:
    """Which conversation a request belongs to, and how many turns of it came before."""
    round_of_chats, place = divmod(serial, CONVERSATIONS * TURNS)
    return round_of_chats * CONVERSATIONS + place % CONVERSATIONS, place // CONVERSATIONS


def quoting(quotation: float) -> Shape:
    """A page of readable English and a question about it; `quotation`, from 0 to 1, is the share of questions that ask
    for a passage word for word. Other languages have no pages.
    """

    def ask(writer: Writer, tokens: int) -> tuple[Message, ...]:
        return tuple(quotes.question(writer.seed, writer.serial, tokens, quotation).messages())

    return ask


def uniform(low: int, high: int) -> Law:
    """Whole numbers from low to high, both included, each as likely."""
    return lambda random: random.randint(low, high)


def constant(value: int) -> Law:
    """Always the same, without a draw."""
    return lambda random: value


def lognormal(median: int, sigma: float, low: int, high: int) -> Law:
    """exp(normal(ln median, sigma)), rounded down, then clipped to low..high."""
    return lambda random: min(high, max(low, int(random.lognormvariate(math.log(median), sigma))))


@dataclass(frozen=True, slots=True)
class Workload:
    """Distributions of prompt and answer lengths in tokens, and the prompt's shape.

    `concurrency` is what a closed loop runs with where none is asked for.
    """

    prompt_tokens: Law
    output_tokens: Law
    shape: Shape = question
    concurrency: tuple[int, ...] = (1, 8, 32)
    language: Language = field(default=LANGUAGES["en"])

    def draw(self, count: int, *, seed: int, first: int = 0) -> list[Job]:
        """Lengths depend on the seed alone, so every level of a run asks for the same work: all prompts' lengths are
        drawn, then all outputs'. Text depends on the seed and the serial.
        """
        return [
            self._job(Writer(self.language, seed, serial), prompt, output)
            for serial, (prompt, output) in enumerate(self.lengths(count, seed=seed), start=first)
        ]

    def _job(self, writer: Writer, prompt: int, output: int) -> Job:
        chat = f"{writer.seed}-{chat_and_turn(writer.serial)[0]}" if self.shape is conversation else None
        return Job(writer.serial, self.shape(writer, prompt), prompt, output, chat)

    def lengths(self, count: int, *, seed: int) -> list[tuple[int, int]]:
        """For `count` jobs: tokens of the prompt, and tokens of the answer."""
        random = Random(seed)
        prompts = [self.prompt_tokens(random) for _ in range(count)]
        outputs = [self.output_tokens(random) for _ in range(count)]
        return list(zip(prompts, outputs, strict=True))


WORKLOADS = {
    "short": Workload(uniform(20, 60), uniform(32, 64)),
    "long-output": Workload(uniform(20, 60), uniform(512, 1024)),
    "mixed-64": Workload(lognormal(1400, 0.5, 200, 4000), uniform(16, 256), concurrency=(64,)),
    "rag-40": Workload(constant(4853), uniform(64, 320), concurrency=(40,)),
    # RAGFlow's requests: the prompts as measured, their answers' lengths assumed.
    "ragflow-chat": Workload(uniform(4700, 5006), uniform(64, 320), retrieval_chat),
    "ragflow-ingest": Workload(uniform(2626, 2738), uniform(128, 512), extraction, concurrency=(10,)),
    # Chats that go on, so that it matters whether a turn comes to the server that has the one before.
    "conversations": Workload(constant(1200), uniform(48, 80), conversation, concurrency=(64,)),
    # Extractive questions: answers that can be copied, and end by themselves.
    "rag-quote": Workload(constant(quotes.PROMPT_TOKENS), constant(200), quoting(1.0)),
}


def named(name: str, language: str, quotation: float | None) -> Workload:
    """The workload of this name in this language, for rag-quote with this share of questions that ask for a passage.

    Raises ValueError for a language or a share that the workload does not have.
    """
    found = replace(WORKLOADS[name], language=LANGUAGES[language])
    if name == "rag-quote" and language != "en":
        raise ValueError("the pages of rag-quote are in English only: leave --language out")
    if name != "rag-quote" and quotation is not None:
        raise ValueError(f"{name} has no questions that quote: --quotation is for --workload rag-quote")
    return found if quotation is None else replace(found, shape=quoting(quotation))


def digest(jobs: list[Job]) -> str:
    """A digest of these requests in this order: runs with the same digest had the same work."""
    asked = [(job.messages, job.max_tokens) for job in jobs]
    return sha256(orjson.dumps(asked)).hexdigest()[:16]
