"""Questions about pages of text, most of whose answers stand in the page word for word: the workload rag-quote.

Pages list invented stations, ships, recipes and bridges. All that a question consists of depends on the seed and its
serial number; only what is asked depends on the share of quotation.
"""

from dataclasses import dataclass
from random import Random

COUNT = 200
PROMPT_TOKENS = 1200
WORDS_PER_TOKEN = 0.64
"""Of these pages, as measured with SmolLM2's tokenizer; 0.65 with Qwen3's."""

INSTRUCTION = "Answer from the page below. When you are asked to quote, copy the text exactly and add nothing."


@dataclass(frozen=True, slots=True)
class Kind:
    """What a page lists: an entry's name, then one sentence of each group, the later groups in any order."""

    title: str
    name: str
    groups: tuple[tuple[str, ...], ...]


KINDS = (
    Kind(
        "Railway stations of the {place} line",
        "{place} station",
        (
            (
                "{name} opened on {date} with {few} platforms and a signal box of {material}.",
                "Trains have called at {name} since {date}, when the line from {place} was extended by {many} miles.",
                "{name} was built for {many}00 pounds by {person}, and its first train left on {date}.",
            ),
            (
                "Its busiest year was {year}, when {many},{many}0 tickets were sold and {many} wagons of {goods} left.",
                "In {year} the goods yard handled {many}0 tons of {goods} a week, most of it bound for {place}.",
            ),
            (
                "{person} kept the station for {many} years and grew {goods} between the tracks.",
                "The last stationmaster, {person}, retired on {date} and kept the lamp from the {material} footbridge.",
            ),
            (
                "The waiting room has a clock from {place} that has run {few} minutes fast since {year}.",
                "A roof of {material} replaced the old one after the storm of {date}.",
            ),
        ),
    ),
    Kind(
        "Ships registered at {place}",
        "the {adjective} {bird}",
        (
            (
                "Launched at {place} on {date}, {name} was {many} metres long and carried {many} hands.",
                "{person} ordered {name} in {year} to bring {goods} from {place} in under {many} days.",
                "The yard at {place} took {few} years over {name}, whose hull was of {timber} and {timber}.",
            ),
            (
                "On {date} she ran aground off {place} with {many}0 barrels of {goods} and lay there for {few} tides.",
                "Her fastest passage, {many} days from {place}, was logged by {person} in {year}.",
            ),
            (
                "{person}, her master for {few} voyages, wrote that she steered best with {goods} in the forward hold.",
                "Her bell, cast in {place}, hangs in the school at {place} beside a portrait of {person}.",
            ),
            (
                "She was sold for {many}50 crowns in {year} and ended as a store for {goods} at {place}.",
                "A survey of {date} found {few} planks of {timber} that needed to be replaced.",
            ),
        ),
    ),
    Kind(
        "Recipes from the kitchen at {place}",
        "{place} {goods} cake",
        (
            (
                "For {name}, mix {many}0 grams of flour with {few} eggs and the {goods} of the season.",
                "{person} first baked {name} on {date}, for {many} guests from {place}.",
                "The recipe for {name} fills {few} lines of a notebook that {person} began in {year}.",
            ),
            (
                "Stir in {few} spoons of {goods}, cover the bowl and let it rest for {many} minutes.",
                "Bake it at {many}0 degrees for {many} minutes in a dish of {vessel}, and turn it {few} times.",
            ),
            (
                "It keeps for {few} days in a box of {vessel}, and tastes best with {goods}.",
                "Cut it into {many} pieces, and serve it with {goods} from {place}.",
            ),
            (
                "In {place} it is eaten on {date}, when each house gives {few} slices to its neighbours.",
                "A prize of {many} crowns for the best one was won by {person} in {year}.",
            ),
        ),
    ),
    Kind(
        "Bridges over the river at {place}",
        "{place} bridge",
        (
            (
                "{name} has {few} arches of {material} and was opened to carts on {date}.",
                "{person} drew {name} in {year}, with a span of {many} metres and a roadway of {material}.",
                "Until {date}, when {name} was finished, a ferry carried {many} people a day to {place}.",
            ),
            (
                "The toll was {few} pence for a cart of {goods} and nothing for those on foot.",
                "The flood of {date} rose {many} inches above the road and took {few} of its lamps.",
            ),
            (
                "{person} inspected it every spring for {many} years and never found more than {few} loose stones.",
                "It cost {many}00 crowns, of which {place} paid a half with a tax on {goods}.",
            ),
            (
                "Since {year} it has carried {many}0 vehicles a day, and a path leads below it to {place}.",
                "Its railings of {material} were cast by {person} and painted again in {year}.",
            ),
        ),
    ),
)

_LISTS = {
    "start": "Alder Brack Cold Dun Elm Farn Gold Hart Ivy Kings Lang Marsh North Oak Pen Quarry Raven Stone Thorn Wil",
    "end": "bury combe dale ford gate ham haven hurst ley mere moor mouth ridge stead ton wick",
    "first": "Ada Bruno Clara Dora Edwin Felix Greta Hugo Ida Jonas Karla Leo Mina Nils Olga Paul Rosa Simon Tilda",
    "last": "Abbot Baxter Carver Dyer Ellery Fisher Glover Hale Ives Kemp Lorimer Mercer Naylor Osgood Potter Salter",
    "month": "January February March April May June July August September October November December",
    "few": "two three four five six seven eight nine",
    "material": "oak brick granite iron slate copper sandstone larch concrete",
    "timber": "oak larch elm teak pine ash",
    "vessel": "enamel clay copper beech tin",
    "goods": "apples barley honey walnuts salt pears rye plums cider almonds mint cheese",
    "adjective": "Amber Bold Crimson Distant Early Faithful Gentle Hidden Iron Jolly Lucky Northern Patient Quiet",
    "bird": "Avocet Bittern Curlew Dunlin Egret Fulmar Gannet Heron Kestrel Lapwing Merlin Osprey Plover Swallow",
}
LISTS = {sort: tuple(words.split()) for sort, words in _LISTS.items()}


class Words(dict[str, str]):
    """The words of a template: those that were set, and for every other place a new one of its sort."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self.random = random

    def __missing__(self, sort: str) -> str:
        match sort:
            case "place":
                return self["start"] + self["end"]
            case "person":
                return f"{self['first']} {self['last']}"
            case "date":
                return f"{self.random.randint(1, 28)} {self['month']} {self['year']}"
            case "year":
                return str(self.random.randint(1801, 1989))
            case "many":
                return str(self.random.randint(11, 99))
            case _:
                return self.random.choice(LISTS[sort])


@dataclass(frozen=True, slots=True)
class Question:
    """A page, what is asked about it, and the passage that is asked for; None where the answer is in free words."""

    page: str
    question: str
    passage: str | None

    def messages(self) -> list[dict[str, str]]:
        """The chat that asks it."""
        return [
            {"role": "system", "content": f"{INSTRUCTION}\n\n{self.page}"},
            {"role": "user", "content": self.question},
        ]


def questions(count: int = COUNT, seed: int = 0, quotation: float = 1.0) -> list[list[dict[str, str]]]:
    """Chats of about PROMPT_TOKENS tokens, whose first ones are the same for any count.

    `quotation`, from 0 to 1, is the share of them that ask for a passage of the page word for word.
    """
    return [question(seed, serial, PROMPT_TOKENS, quotation).messages() for serial in range(count)]


def question(seed: int, serial: int, tokens: int, quotation: float) -> Question:
    """The question with this number, for a prompt of about as many tokens, and with two entries at least.

    Raises ValueError for a quotation outside 0..1.
    """
    if not 0 <= quotation <= 1:
        raise ValueError(f"quotation is a share from 0 to 1, not {quotation}")
    random = Random(f"{seed}/{serial}")
    kind = random.choice(KINDS)
    words = Words(random)
    title = kind.title.format_map(words)
    entries = _entries(kind, words, int(tokens * WORDS_PER_TOKEN) - len(f"{INSTRUCTION} {title}".split()))
    name, passage = random.choice(list(entries.items()))
    page = "\n\n".join([f"{title}, list {serial}", *entries.values()])
    # Spread evenly: of the first n questions, n times the share quote, rounded down.
    if int((serial + 1) * quotation) > int(serial * quotation):
        return Question(page, f"Quote the whole entry on {name}, word for word.", passage)
    return Question(page, f"Say in your own words why {name} would be worth a visit, in three sentences.", None)


def _entries(kind: Kind, words: Words, room: int) -> dict[str, str]:
    """Paragraphs by name, until they have this many words."""
    entries: dict[str, str] = {}
    while room > 0 or len(entries) < 2:
        words["name"] = kind.name.format_map(words)
        if words["name"] in entries:
            room -= 1  # so that it ends though all names are taken
        else:
            entries[words["name"]] = paragraph = _paragraph(kind, words)
            room -= len(paragraph.split())
    return entries


def _paragraph(kind: Kind, words: Words) -> str:
    first, *others = map(words.random.choice, kind.groups)
    words.random.shuffle(others)
    sentences = [sentence.format_map(words) for sentence in (first, *others)]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
