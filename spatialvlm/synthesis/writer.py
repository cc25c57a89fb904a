"""Turns a derived answer into a question: names, marks, options, sentences, slots.

One :class:`Writer` writes one row. All its choices come from a hash of the question, so the wording
does not depend on the executor, the number of workers, or on other rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from spatialvlm.answers import (
    LETTERS,
    AnswerType,
    format_answer,
    number_text,
    printed_value,
    round_half_up,
)
from spatialvlm.synthesis.context import SceneContext
from spatialvlm.synthesis.formats import allowed_formats
from spatialvlm.synthesis.marks import mark_colour, mark_record
from spatialvlm.synthesis.referral import refer
from spatialvlm.synthesis.rows import (
    QA,
    Draws,
    Form,
    MediaKind,
    Reason,
    Reject,
    Slot,
    Turn,
    compact_json,
)
from spatialvlm.synthesis.wording import UNIT_WORDS, PhraseBook, Ref, Wording

OPTION_GAP = 0.2
"""Least relative difference of a numeric distractor from the truth and from every other one."""
OPTION_RATIO = (0.4, 1.8)


class Writer:
    """Writes one question.

    Args:
        ctx: The scene.
        task: Task id.
        args_json: Arguments of the question as JSON; they seed every choice.
        forms: Answer forms to choose from.
        seed: Global seed.
        identity: Whose choices to make: the scene id.
        wording: How to word questions.
        book: Templates.
    """

    def __init__(
        self,
        ctx: SceneContext,
        task: str,
        args_json: str,
        forms: Sequence[Form],
        *,
        seed: int,
        identity: str,
        wording: Wording,
        book: PhraseBook,
    ) -> None:
        self.ctx = ctx
        self.task = task
        self.wording = wording
        self.book = book
        self.draws = Draws(seed, identity, task, args_json)
        self.base: Form = self.draws.choice(forms)
        """Form of the answer itself; a sentence may still wrap it."""
        self.in_sentence = self.draws.happens(wording.sentences)
        self.wants_steps = self.draws.happens(wording.cot)
        self.step_tags: tuple[str, ...] = ()
        self.refs: dict[int, Ref] = {}
        self.marks: list[dict[str, Any]] = []
        self.frames: tuple[int, ...] = ()
        self.media: MediaKind = "images"

    @property
    def form(self) -> Form:
        """Form that goes into the row and its id."""
        return "SENT" if self.in_sentence and self.base != "JSON" else self.base

    # Names ---------------------------------------------------------------------------------------
    def show(self, frames: Sequence[int], media: MediaKind = "images") -> None:
        """State which frames the question shows; names are checked against them."""
        self.frames = tuple(frames)
        self.media = media

    def name(self, obj: int) -> Ref:
        """Name an object by words, or by a mark where the words do not suffice.

        Raises:
            Reject: ``referral`` or ``mark``.
        """
        if obj not in self.refs:
            try:
                self.refs[obj] = refer(
                    self.ctx,
                    obj,
                    self.frames,
                    self.draws,
                    video=self.media == "video",
                    colours=self.wording.colours,
                )
            except Reject:
                if self.media != "images":
                    raise
                return self.mark(obj)
        return self.refs[obj]

    def mark(self, obj: int, image: int | None = None, kind: str = "box") -> Ref:
        """Name an object by a coloured mark drawn into the image in which it is clean.

        Args:
            obj: Object index.
            image: Position of the image among the shown frames; ``None`` takes the first image in
                which the object is clean.
            kind: ``box`` or ``point``.

        Raises:
            Reject: ``mark``: not clean in the image, or no colour left.
        """
        where = [i for i, f in enumerate(self.frames) if self.ctx.view(f).is_clean(obj)]
        if image is None and where:
            image = where[0]
        if image is None or image not in where:
            raise Reject(Reason.MARK, f"object {obj} is not clean in the image to mark")
        taken = {record["color"] for record in self.marks}
        colour = mark_colour(self.draws, taken, self.ctx.objects[obj].color_name)
        record = mark_record(self.ctx, self.frames[image], image, obj, colour, kind)
        self.marks.append(record)
        phrase = f"the object in {record['name']}" if kind == "box" else record["name"]
        self.refs[obj] = Ref(obj, phrase, self.ctx.labels[obj], "mark")
        return self.refs[obj]

    def name_all(self, objects: Sequence[int], *, marked: bool = False) -> list[Ref]:
        """Name several objects; two of them never get the same phrase.

        Raises:
            Reject: ``referral``.
        """
        refs = [self.mark(obj) if marked else self.name(obj) for obj in objects]
        if len({ref.phrase for ref in refs}) < len(refs):
            raise Reject(Reason.REFERRAL, "two objects share one phrase")
        return refs

    # Options -------------------------------------------------------------------------------------
    def options(self, right: str, wrong: Sequence[str]) -> tuple[list[str], int]:
        """Mix the right option in at a uniform position.

        Raises:
            Reject: ``distractors``: two options are equal.
        """
        mixed = self.draws.shuffled(wrong)
        position = self.draws.integer(len(mixed) + 1)
        mixed.insert(position, right)
        if len({text.lower() for text in mixed}) < len(mixed) or len(mixed) < 2:
            raise Reject(Reason.DISTRACTORS, f"options {mixed}")
        return mixed, position

    def number_options(self, value: float, places: int, count: int = 4) -> list[str]:
        """Wrong numbers around ``value``: ratio 0.4 to 1.8, 20 % apart from the truth and each other.

        The rank of the truth among the options is uniform.

        Raises:
            Reject: ``distractors``: the number is too coarse for that.
        """
        value = round_half_up(value, places)
        below = self.draws.integer(count)
        low, high = OPTION_RATIO
        wrong: list[float] = []
        for side in range(count - 1):
            smaller = side < below
            for _ in range(24):
                share = self.draws.unit()
                ratio = (
                    low + share * (1 - OPTION_GAP - low)
                    if smaller
                    else 1 + OPTION_GAP + share * (high - 1 - OPTION_GAP)
                )
                candidate = round_half_up(value * ratio, places)
                if all(
                    abs(candidate - other) >= OPTION_GAP * max(abs(candidate), abs(other)) - 1e-9
                    for other in (value, *wrong)
                ):
                    wrong.append(candidate)
                    break
            else:
                raise Reject(Reason.DISTRACTORS, f"no numeric distractor for {value}")
        return [number_text(item, places) for item in wrong]

    def count_options(self, value: int, count: int = 4) -> list[str]:
        """Wrong counts within 3 of the truth, at least 0."""
        near = [value + step for step in (-3, -2, -1, 1, 2, 3) if value + step >= 0]
        return [str(item) for item in self.draws.shuffled(near)[: count - 1]]

    # Turns ---------------------------------------------------------------------------------------
    def turn(
        self,
        answer_type: AnswerType,
        answer: Any,
        slots: Mapping[str, Any],
        *,
        variant: str = "",
        unit: str | None = None,
        places: int | None = None,
        wrong: Sequence[str] | None = None,
        form: Form | None = None,
        hint: bool = True,
    ) -> Turn:
        """Write one question with its answer.

        Args:
            answer_type: Type of ``answer`` for the open forms; MCQ always stores the option's text.
            answer: Typed value; a number is rounded to ``places``.
            slots: Values of the template's slots.
            variant: Part of the template key.
            unit: Unit of a number; selects ``FORM@unit`` templates.
            places: Decimals of a number.
            wrong: Wrong option texts; given for MCQ only.
            form: Overrides the form of the row (turns of a dialogue).
            hint: ``False`` leaves out how to answer, where the wording has such hints.
        """
        base = form or self.base
        template = self.book.choose(
            self.draws, self.wording, self.ctx.scene.split, self.task, base, variant, unit
        )
        question, spans = template.fill(slots)
        if answer_type == "number":
            shown = number_text(answer, 2 if places is None else places)
            answer = printed_value(shown)
        else:
            shown = format_answer(answer_type, answer)
        options: list[str] = []
        choice: int | None = None
        if base == "MCQ":
            if wrong is None:
                raise ValueError(f"task {self.task}: form MCQ needs wrong options")
            answer_type, answer = "mcq", shown
            options, choice = self.options(shown, wrong)
            block = "\n".join(map("{}. {}".format, LETTERS, options))
            start = len(question) + 1
            for obj, (a, b) in self._mentions(block):
                spans.setdefault(obj, []).append((start + a, start + b))
            question = f"{question}\n{block}"
        text = format_answer(answer_type, answer, options=options) if base == "MCQ" else shown
        sentence = self.in_sentence and base != "JSON"
        reply, reply_id = text, "terse"
        if sentence:
            reply, reply_id = self._sentence(base, answer, shown, choice, unit)
        elif hint and self.wording.hints and answer_type in _HINTED:
            how = self.book.choose(self.draws, self.wording, "train", "_hint", base).text
            question = f"{question}\n{how}" if base == "MCQ" else f"{question} {how}"
        return Turn(
            form="SENT" if sentence else base,
            answer_type=answer_type,
            question=question,
            reply=reply,
            answer=answer,
            answer_text=text,
            template_id=template.id,
            answer_template_id=reply_id,
            unit=unit,
            options=tuple(options),
            choice_idx=choice,
            spans=spans,
        )

    def explained(self, turn: Turn, steps: str | None) -> Turn:
        """Put the steps of a chain of thought before the answer; without steps the turn stays."""
        if steps is not None:
            how = self.book.choose(self.draws, self.wording, "train", "_hint", "COT").text
            turn.question = f"{turn.question}\n{how}"
            turn.reply = f"{steps} So the answer is {turn.answer_text}."
            turn.form, turn.answer_template_id = "SENT", "cot"
            self.step_tags = ("cot",)
        return turn

    def _sentence(
        self, base: Form, answer: Any, shown: str, choice: int | None, unit: str | None
    ) -> tuple[str, str]:
        """A sentence that states the answer, and the id of its pattern."""
        variant = str(answer).lower() if base == "YN" else ""
        template = self.book.choose(self.draws, self.wording, "train", "_reply", base, variant)
        letter = "" if choice is None else LETTERS[choice]
        slots = {"answer": shown, "letter": letter, "unit": UNIT_WORDS.get(unit or "", "")}
        text = template.fill(slots)[0].replace(" .", ".")
        return text, template.id

    # Rows ----------------------------------------------------------------------------------------
    def qa(
        self,
        *turns: Turn,
        tags: Sequence[str] = (),
        group: str = "",
        system: str = "",
        formats: Sequence[int] | None = None,
    ) -> QA:
        """Finish the question: slots for the objects it names, formats it may be shown in.

        Args:
            turns: One or several questions.
            tags: Further tags of the row.
            group: Ties rows of one scene.
            system: System message.
            formats: The only instruction formats that do not give the answer away; ``None`` = all.
        """
        slots = self._slots(turns, 1 if system else 0) if self.media == "images" else []
        return QA(
            turns=list(turns),
            frames=self.frames,
            media=self.media,
            slots=slots,
            marks=self.marks,
            formats_ok=[f for f in self._formats(slots) if formats is None or f in formats],
            system=system or None,
            tags=tuple(tags),
            group=group,
        )

    def _slots(self, turns: Sequence[Turn], offset: int) -> list[Slot]:
        """What formats need to know about each named object; ``offset`` messages come first."""
        spans: dict[int, list[list[int]]] = {}
        for number, turn in enumerate(turns):
            message = offset + 2 * number
            for obj, ranges in turn.spans.items():
                spans.setdefault(obj, []).extend([message, a, b] for a, b in ranges)
            for obj, (a, b) in self._mentions(turn.reply):
                spans.setdefault(obj, []).append([message + 1, a, b])
        return [Slot(*self._slot_part(self.refs[obj]), places) for obj, places in spans.items()]

    def _slot_part(self, ref: Ref) -> tuple[dict[str, Any], str]:
        """What a slot says about an object named like this in the shown frames, and its JSON text."""
        marked, parts = ref.how == "mark", self.ctx.slot_parts
        phrase = ref.label if marked else ref.short
        key = (ref.obj, phrase, marked, self.wording.masks, *self.frames)
        if key not in parts:
            fixed = {
                "obj": ref.obj,
                "label": ref.label,
                "phrase": phrase,
                "unique": not marked,
                **self._shapes(ref.obj),
            }
            parts[key] = (fixed, compact_json(fixed)[:-1])
        return parts[key]

    def _shapes(self, obj: int) -> dict[str, Any]:
        """Image size, and boxes and masks of an object in the shown images in which it is clean."""
        boxes, masks = {}, {}
        size = (0, 0)
        for image, frame in enumerate(self.frames):
            view = self.ctx.view(frame)
            if not view.is_clean(obj):
                continue
            boxes[str(image)] = [round(value, 1) for value in view.vis[obj].bbox2d]
            size = (view.camera.width, view.camera.height)
            if self.wording.masks:
                masks[str(image)] = self.ctx.mask(frame, obj)
        return {"size": size, "boxes": boxes, "masks": masks}

    def _mentions(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """Where a text names the objects of the row without an article; longer names win."""
        if not self.refs:
            return []
        found: list[tuple[int, tuple[int, int]]] = []
        named = [ref for ref in self.refs.values() if ref.short in text]
        for ref in sorted(named, key=lambda ref: (-len(ref.short), ref.obj)):
            start = text.find(ref.short)
            while start >= 0:
                end = start + len(ref.short)
                if all(end <= a or b <= start for _, (a, b) in found):
                    found.append((ref.obj, (start, end)))
                start = text.find(ref.short, end)
        return found

    def _formats(self, slots: Sequence[Slot]) -> list[int]:
        if self.media != "images":
            return [0]
        if not self.wording.varies_formats:
            return [] if self.marks else [0]
        named = {record["obj"] for record in self.marks if "obj" in record}
        free_marks = len(self.marks) > len(named)
        if not slots or free_marks:
            # Marks that belong to no slot would be lost; an empty list means "as written".
            return [] if self.marks else [0]
        return allowed_formats([slot.fixed for slot in slots])


_HINTED = frozenset({"mcq", "yesno", "number", "text"})


def dominant(values: Mapping[str, float]) -> tuple[str, float, float]:
    """Largest entry: its key, its value, and its ratio to the second largest.

    Args:
        values: At least two non-negative numbers.
    """
    ranked = sorted(values, key=lambda key: (-round(values[key], 6), key))
    first, second = values[ranked[0]], values[ranked[1]]
    return ranked[0], first, first / second if second > 1e-9 else math.inf
