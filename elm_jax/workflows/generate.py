"""The workflow behind `elm generate`: questions, the models that answer them, and their answers."""

import collections
import dataclasses
import functools
from collections.abc import Generator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from elm_jax.data.arrays.batches import Tokens
from elm_jax.data.arrays.prepared import CHAT, LEFT, PLAIN
from elm_jax.data.prompts.templates import dataset_path
from elm_jax.data.registry import registry
from elm_jax.errors import InputError, describe
from elm_jax.evaluation.answer_text import Answer
from elm_jax.evaluation.generation_settings import GenerationSettings
from elm_jax.evaluation.text_generator import TextGenerator
from elm_jax.experts.base import Base, load_base
from elm_jax.experts.card import ExpertCard, base_folder
from elm_jax.experts.overlay import Expert, check_base, load_expert, read_card, resolve
from elm_jax.experts.rendering import check_chat
from elm_jax.models.layers.gate_tasks import number_of, reads_tasks, tasks_of
from elm_jax.routing.cases import RouterSettings
from elm_jax.routing.router import check_router, default_router
from elm_jax.routing.text import RoutingInstance
from elm_jax.runtime import sharding, storage
from elm_jax.runtime.config_checks import (
    DEFAULT_MODULES,
    check_characters,
    check_range,
    check_types,
    items_of,
)
from elm_jax.workflows.choices import NONE_PER
from elm_jax.workflows.route import (
    RouteOptions,
    check_row_router,
    open_library,
    read_examples,
    routed_task,
    with_threshold,
)
from elm_jax.workflows.row_routes import (
    BASE_ID,
    RowRoute,
    check_none_of_these,
    folder_of_answers,
    row_reasons,
)
from elm_jax.workflows.target_task import target_options
from elm_jax.workflows.tasks.show_tasks import right_answers, show_task

ROWS = 3
"""Rows of a task that are asked if no number is given."""
MOST_MODELS = 4
"""Models of a library that stay on the device."""


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Who is asked, what, and how texts are generated.

    Attributes:
        base: folder of the base; None for the one that the experts' cards name.
        experts: folders of experts of that base: each answers every question; none and no library asks the
            base itself.
        library: folder of a library, which routes each question to one of its experts.
        router: of the library; None for its own.
        texts: questions.
        examples: file of questions in JSON lines (see `route.read_examples`).
        task: registered task, whose rows are asked as its template renders them.
        split: of the task; None for the one that it is scored on.
        rows: of the task, the first ones; None for `ROWS`.
        chat: whether questions are framed by the base's chat template; None frames free texts to a base
            that has one, and what an expert's card says was framed while it was trained.
        encoder_dir: folder of the weights of the library's encoder.
        modules: registries to import by name.
        settings: of the texts.
        none_of_these: who answers a question that none of the library's experts fits: ``base``, or an
            expert's id in the library or its folder; None does not ask whether one fits.
        none_per: whether that is told of each question by itself, ``row``, as None does, or of all questions
            of a ``task``, or of a file, together.
        gate_task: task whose vector the gates of a network that reads tasks get; None for `task`.
    """

    base: storage.PathLike | None = None
    experts: tuple[storage.PathLike, ...] = ()
    library: storage.PathLike | None = None
    texts: tuple[str, ...] = ()
    examples: storage.PathLike | None = None
    task: str | None = None
    split: str | None = None
    rows: int | None = None
    chat: bool | None = None
    encoder_dir: storage.PathLike | None = None
    modules: tuple[str, ...] = DEFAULT_MODULES
    settings: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)
    router: str | None = None
    none_of_these: storage.PathLike | None = None
    none_per: str | None = None
    gate_task: str | None = None

    def __post_init__(self) -> None:
        """Raises InputError for settings that are wrong, exclude each other or have no effect."""
        check_types(self)
        check_range("rows", self.rows, 1)
        self._at_most_one("Questions come from one place", "texts", "examples", "task")
        self._at_most_one("Experts come from one place", "experts", "library")
        self._needs("task", "split", "rows")
        self._needs("library", "encoder_dir", "router", "none_of_these")
        check_none_of_these(self.none_of_these, self.none_per, self.library)
        if self.none_per == "task" and not (self.task or self.examples):
            raise InputError(describe("Only questions of one task are told together that no expert fits",
                                      where="none_per", got=self.none_per, expected="a task, or a file of "
                                      "examples", cure="leave it out: each text is told by itself"))
        check_row_router(self.router)
        if not (self.base or self.experts or self.library):
            raise InputError(describe("There is no model to ask", expected="a base, experts or a library"))

    def _at_most_one(self, what: str, *names: str) -> None:
        given = [name for name in names if getattr(self, name)]
        if len(given) > 1:
            raise InputError(describe(what, got=" and ".join(given), expected=f"one of {', '.join(names)}"))

    def _needs(self, needed: str, *names: str) -> None:
        idle = [name for name in names if getattr(self, name) is not None]
        if idle and getattr(self, needed) is None:
            raise InputError(describe(f"A setting has no effect without a {needed}", where=", ".join(idle),
                                      cure=f"give a {needed}, or leave it out"))


@dataclasses.dataclass(frozen=True)
class Question:
    """A text to answer.

    Attributes:
        text: of the question.
        where: it came from, for errors.
        instance: as routing sees it.
        target: the answer that a task's row has; None for others.
        is_free: whether no task rendered it.
        keeps_end: whether a prompt that the context does not hold loses its start, as its task says; else it
            is refused.
    """

    text: str
    where: str
    instance: RoutingInstance
    target: str | None = None
    is_free: bool = True
    keeps_end: bool = False

    @classmethod
    def free(cls, text: str, where: str) -> "Question":
        """Makes a question of a free text; InputError for one that is no text, or empty."""
        if not isinstance(text, str):
            raise InputError(describe("A question is a text", where=where, got=repr(text)[:100]))
        if not text.strip():
            raise InputError(describe("A text to answer is empty", where=where))
        check_characters(text, where)
        return cls(text, where, RoutingInstance(text))


@dataclasses.dataclass(frozen=True)
class Reply:
    """What one model answered to one question.

    Attributes:
        question: number, from 0.
        model: id of the expert, or `BASE_ID`.
        answer: text, number of tokens, why it ended.
        rendering: of the question, one of `prepared.RENDERINGS`.
        route: why this expert was chosen; None where none was.
    """

    question: int
    model: str
    answer: Answer
    rendering: str
    route: RowRoute | None = None

    def to_dict(self, question: Question) -> dict[str, Any]:
        """Returns question and answer as a JSON-ready dictionary."""
        target = {} if question.target is None else {"target": question.target}
        routed = {} if self.route is None else {"routed": self.route.to_dict()}
        return {"question": self.question, "input": question.text, "expert": self.model,
                **dataclasses.asdict(self.answer), "rendering": self.rendering, **target, **routed}


class Panel:
    """The models that answer the questions of one `GenerateConfig`; each is read when it is first asked.

    Attributes:
        base: of all models, on one device.
        names: of the models; of a library, of all its experts.
    """

    def __init__(self, config: GenerateConfig) -> None:
        """Reads the base, and the cards of the experts.

        Raises:
            InputError: a folder is not there or not whole, an expert is another base's, or the base has no
                vocabulary, or no chat template though it is asked for.
        """
        self._config = config
        self._library = None if config.library is None else open_library(config.library, config.encoder_dir)
        self._routed = None if self._library is None else self._library.routed()
        if self._routed is not None:
            router = config.router or default_router(self._routed)
            check_router(router, self._routed, queries=True, text=False)
            self._routed = with_threshold(
                self._routed, RouterSettings(none_of_these=config.none_of_these is not None))
        self._otherwise = BASE_ID
        self._cards = self._read_cards()
        self.base = load_base(base_folder((card for _, card in self._cards.values()), config.base),
                              mesh=_one_device())
        for name, (folder, card) in self._cards.items():
            check_base(self.base, card, folder)
            check_chat(self.base, card.rendering == CHAT and config.chat is None, where=f"the card of {name}")
        check_chat(self.base, config.chat)
        self._task = _task_read(self.base, config)
        self.names = list(self._cards) or [BASE_ID]
        self._asked: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()  # in streams
        self._generator = functools.lru_cache(MOST_MODELS if self._library else None)(self._make)

    def routes(self, questions: Sequence[Question]) -> list[list[tuple[str, RowRoute | None]]]:
        """Says which models answer each question, and why if a library chose them."""
        if self._library is None:
            return [[(name, None) for name in self.names] for _ in questions]
        instances, config = [question.instance for question in questions], self._config
        router = config.router or default_router(self._routed)
        options = self._options(router)
        task = routed_task(self._library, instances, options)
        per = None if config.none_of_these is None else config.none_per or NONE_PER[0]
        found = row_reasons(self._library, self._routed, task, router, none_per=per)
        return [[(self._otherwise if route.is_sure is False else route.expert, route)] for route in found]

    def _options(self, router: str) -> RouteOptions:
        """What the router is told of the task that questions are rows of."""
        if self._config.task is None:
            return {}
        registry.import_tasks(self._config.modules)  # families of tasks come from there
        return target_options(self._config.task, self._routed, router)

    def ask(self, questions: Sequence[Question]) -> list[Reply]:
        """Answers all questions, in their order; each model answers its own in batches."""
        routes = self.routes(questions)
        asked: dict[str, list[int]] = {}
        for number, models in enumerate(routes):
            for model, _ in models:
                asked.setdefault(model, []).append(number)
        prompts = {model: [self._prompt(model, questions[number]) for number in numbers]
                   for model, numbers in asked.items()}
        answers = {}
        for model, numbers in asked.items():
            tokens = [prompt for prompt, _ in prompts[model]]
            front = self._front(questions[numbers[0]], prompts[model][0][1])  # all come from one place
            found = self._generator(model).answer(tokens, self._config.settings, front)
            for number, answer, (_, rendering) in zip(numbers, found, prompts[model], strict=True):
                answers[number, model] = answer, rendering
        return [Reply(number, model, *answers[number, model], route)
                for number, models in enumerate(routes) for model, route in models]

    def stream(self, question: Question, model: str, route: RowRoute | None = None, number: int = 0
               ) -> Generator[str, None, Reply]:
        """Answers one question by one model of `routes`, piece by piece; returns the whole."""
        prompt, rendering = self._prompt(model, question)
        asked = model, tuple(map(int, prompt))
        before, front = self._asked[asked], self._front(question, rendering)
        self._asked[asked] += 1
        answer = yield from self._generator(model).stream(prompt, self._config.settings, before, front)
        return Reply(number, model, answer, rendering, route)

    def _front(self, question: Question, rendering: str) -> str:
        """What stands in front of a task's target in a plain text, and is no part of the target."""
        return "" if question.is_free or rendering == CHAT else self.base.vocabulary.target_prefix

    def _prompt(self, model: str, question: Question) -> tuple[Tokens, str]:
        card = self._cards[model][1] if model in self._cards else None
        rendering = rendering_of(self.base, card, question, self._config.chat)
        room = self._config.settings.max_new_tokens
        return prompt_of(self._generator(model), self.base, question, rendering, room), rendering

    def _make(self, model: str) -> TextGenerator:
        expert = load_expert(self._cards[model][0], mesh=_one_device()) if model in self._cards else None
        return generator_of(self.base, expert, self._task)

    def _read_cards(self) -> dict[str, tuple[str, ExpertCard]]:
        """Folders and cards of the experts by name: the id, or the folder where several have one id.

        Raises:
            InputError: a folder is given twice.
        """
        if self._library is not None:
            return self._read_library()
        folders = list(map(str, self._config.experts))
        if twice := {folder for folder in folders if folders.count(folder) > 1}:
            raise InputError(describe("An expert is given twice", got=", ".join(sorted(twice))))
        cards = [read_card(folder)[1] for folder in folders]
        ids = [card.id for card in cards]
        return {(card.id if ids.count(card.id) == 1 else folder): (folder, card)
                for folder, card in zip(folders, cards, strict=True)}

    def _read_library(self) -> dict[str, tuple[str, ExpertCard]]:
        """Folders and cards of the library's experts, and of one beside it that answers where none fits."""
        found = {name: (str(self._library.path / "experts" / name), entry.card)
                 for name, entry in self._library.entries.items()}
        answers = self._config.none_of_these
        folder = None if answers is None else folder_of_answers(self._library, answers)
        if folder is None:
            return found
        if answers in found:
            self._otherwise = answers
            return found
        card = read_card(folder)[1]
        self._otherwise = str(folder) if card.id in found else card.id
        return {**found, self._otherwise: (str(folder), card)}


def read_questions(config: GenerateConfig) -> list[Question]:
    """Reads the questions of a config: its texts, a file's, or a task's rows; none if it names none.

    Raises:
        InputError: an empty text, a file or task that is not there, or none in it.
    """
    if config.task is not None:
        shown = show_task(config.task, config.split, config.rows or ROWS, modules=config.modules)
        where = f"{config.task}, {shown['split']}, row"
        return [Question(row["input"], f"{where} {row['row']}", RoutingInstance(
            row["input"], row["choices_expression"], tuple(row["choices"])), right_answers(row),
            is_free=False, keeps_end=shown["cut_prompt"] == LEFT) for row in shown["rows"]]
    if config.examples is not None:
        return [Question(instance.source, f"{config.examples}, question {number}", instance)
                for number, instance in enumerate(read_examples(config.examples), start=1)]
    return [Question.free(text, f"text {number}") for number, text in enumerate(config.texts, start=1)]


def _task_read(base: Base, config: GenerateConfig) -> str | None:
    """Name of the task that a network's gates read for all questions; None if they read none.

    Raises:
        InputError: they read a task and none is given, or the setting has no effect.
    """
    if not reads_tasks(base.config):
        if config.gate_task is not None:
            raise InputError(describe("A setting has no effect: this base's gates read no tasks",
                                      where="gate_task", got=config.gate_task, cure="leave it out"))
        return None
    if config.task is not None:
        registry.import_tasks(config.modules)
    return config.gate_task or config.task


def generate(base: Base, expert: Expert | None, texts: Sequence[str], *, chat: bool | None = None,
             task: str | None = None, **settings: Any) -> list[str]:
    """Generates an answer to each text.

    Args:
        base: the base.
        expert: an expert of that base; None asks the base itself.
        texts: questions; a string is one of them.
        chat: frames the texts by the base's chat template; None does so for a base that has one, and for an
            expert whose card says that it was trained so.
        task: that the texts are of, for a base whose gates read tasks.
        **settings: fields of `GenerationSettings`: max_new_tokens, temperature, top_k, top_p, seed, stop.

    Returns:
        A text for each, in their order.

    Raises:
        InputError: settings out of range, a text that is empty or that the context does not hold, an expert
            of another base, a task that is missing or unknown to gates that read one.

    Example:
        >>> elm.generate(base, None, ["What is the capital of France?"], max_new_tokens=32)
    """
    known = [field.name for field in dataclasses.fields(GenerationSettings)]
    if unknown := sorted(set(settings) - set(known)):
        raise InputError(describe("Generation has no such setting", got=", ".join(unknown),
                                  expected=", ".join(known)))
    card = None if expert is None else expert.card
    check_chat(base, chat)
    check_chat(base, card is not None and card.rendering == CHAT and chat is None, where="the expert's card")
    generator, prompts = generator_of(base, expert, task), []
    for number, text in enumerate(items_of(texts)):
        question = Question.free(text, f"text {number}")
        prompts.append(prompt_of(generator, base, question, rendering_of(base, card, question, chat)))
    return [answer.text for answer in generator.answer(prompts, GenerationSettings(**settings))]


def generator_of(base: Base, expert: Expert | None, task: str | None = None) -> TextGenerator:
    """Makes the generator of a base, or of an expert on it.

    Args:
        base: the base.
        expert: of that base; None for the base itself.
        task: name of the task that all texts are of, for networks whose gates read tasks.

    Raises:
        InputError: the base has no vocabulary; the expert is another base's or does not fit; gates that read
            tasks lack one, or do not know it.
    """
    if base.vocabulary is None:
        raise InputError(describe("The base carries no vocabulary", where=base.path or base.name))
    network, params = resolve(base, expert)
    if not reads_tasks(network.config):
        return TextGenerator(network, params, base.vocabulary)
    tasks = tasks_of(network.config)
    if task is None:
        raise InputError(describe(
            "This network's gates read the task of a text, and none is given", where=base.path or base.name,
            got="texts of no task", expected=f"one of {len(tasks)} known tasks: {', '.join(tasks[:3])}"
            + ", ..." * (len(tasks) > 3),
            cure="give --gate_task NAME (from Python: task=NAME), or --task NAME to ask rows of a task"))
    known = registry.find_task(task)
    dataset = None if known is None else dataset_path(known.dataset, known.config)
    return TextGenerator(network, params, base.vocabulary, number_of(tasks, task, dataset))


def rendering_of(base: Base, card: ExpertCard | None, question: Question, chat: bool | None) -> str:
    """Says how a question is rendered for a model (a card of None: the base itself)."""
    if chat is not None:
        return CHAT if chat else PLAIN
    if card is not None:
        return card.rendering
    return CHAT if question.is_free and base.chat_template is not None else PLAIN


def prompt_of(generator: TextGenerator, base: Base, question: Question, rendering: str,
              room: int | None = None) -> Tokens:
    """Encodes a question as a prompt, in the base's chat template or as it is.

    A plain prompt whose task cuts on the left loses what the context does not hold beside `room` new tokens.
    """
    if rendering == CHAT:
        return generator.prompt(base.chat_template.ask(question.text), question.where)
    return generator.prompt(question.text, question.where, room if question.keeps_end else None)


def _one_device() -> Mesh:
    return sharding.make_mesh(1, 1, devices=jax.local_devices()[:1])
