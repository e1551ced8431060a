"""SentencePiece vocabularies after T5's conventions, without TensorFlow.

Padding is 0, EOS 1, unknown 2. Behind the trained pieces stand the extra ids (sentinels) in reverse
order: sentinel 0 is the last id. Equal to ``seqio.SentencePieceVocabulary(path, extra_ids)``. T5's file
leaves the sentinels out and they are added here; mT5's holds them itself, as its last 100 pieces.
"""

import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Sequence

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from elm_jax import storage
from elm_jax.errors import InputError, describe

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
EXTRA_IDS = 100
"""T5's number of sentinels."""
_TRAINING_THREADS = 4
"""Fixed: the order in which sums are taken, and so the pieces, depends on it."""


class Vocabulary:
    """Text to token ids and back.

    Attributes:
        proto: contents of the ``.model`` file.
        extra_ids: number of sentinels at the end.
        added_ids: how many of them are not in the file: 0 for mT5, else all.
        size: number of ids: trained pieces and sentinels.
        fingerprint: ``sha256:...`` of the trained model and the number of sentinels added to it.
    """

    def __init__(self, proto: bytes, extra_ids: int | None = None, where: str = "bytes"):
        """Builds a vocabulary from a serialized SentencePiece model.

        Args:
            proto: contents of a ``.model`` file.
            extra_ids: number of sentinels to put behind its pieces; None for T5's 100, unless the file
                ends with sentinels of its own.
            where: name of the file, for errors.

        Raises:
            InputError: not a SentencePiece model, or other ids for padding, EOS and unknown.
        """
        model = sentencepiece_model_pb2.ModelProto()
        try:
            model.ParseFromString(proto)
        except Exception as error:  # protobuf's DecodeError lies in a package that may be absent
            raise InputError(
                describe("Not a SentencePiece model", where=where, got=error)) from error
        if not model.pieces:
            raise InputError(describe("Not a SentencePiece model", where=where, got="no pieces"))
        own = own_sentinels([piece.piece for piece in model.pieces])
        if extra_ids is None:
            extra_ids = 0 if own else EXTRA_IDS
        for number in reversed(range(extra_ids)):
            model.pieces.add(piece=f"▁{sentinel(number)}", score=0.0,
                             type=sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED)
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model.SerializeToString())
        except (RuntimeError, ValueError) as error:
            raise InputError(describe("The vocabulary is damaged", where=where,
                                      got=str(error)[:200])) from error
        found = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
        if found != (PAD_ID, EOS_ID, UNK_ID):
            raise InputError(describe("The vocabulary's special ids are not T5's", where=where,
                                      got=f"padding, EOS, unknown = {found}",
                                      expected=f"{(PAD_ID, EOS_ID, UNK_ID)}"))
        self.proto = proto
        self.added_ids = extra_ids
        self.extra_ids = extra_ids or own
        self.size = self._processor.GetPieceSize()
        digest = hashlib.sha256(proto + b"\0extra_ids=%d" % extra_ids)
        self.fingerprint = f"sha256:{digest.hexdigest()}"

    @classmethod
    def load(cls, path: storage.PathLike, extra_ids: int | None = None) -> "Vocabulary":
        """Reads a ``.model`` file, local or in a bucket.

        Raises:
            InputError: there is no such file, or it does not hold a fitting model.
        """
        path = storage.as_path(path)
        if not path.exists():
            raise InputError(describe("There is no vocabulary here", where=path))
        return cls(path.read_bytes(), extra_ids, where=str(path))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without EOS."""
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids up to the first EOS; ids outside the vocabulary read as unknown."""
        ids = [int(token) for token in ids]
        if EOS_ID in ids:
            ids = ids[:ids.index(EOS_ID)]
        return self._processor.DecodeIds([token if token < self.size else UNK_ID for token in ids])

    def sentinel_id(self, number: int) -> int:
        """Id of sentinel `number`; sentinel 0 is the vocabulary's last id."""
        if not 0 <= number < self.extra_ids:
            raise InputError(describe("There is no such sentinel", got=number,
                                      expected=f"0 to {self.extra_ids - 1}"))
        return self.size - 1 - number

    def file(self) -> str:
        """A file that holds it, for SeqIO, which reads files only; it lives as long as this process."""
        if not hasattr(self, "_folder"):
            self._folder = tempfile.TemporaryDirectory(prefix="elm_vocabulary_")
        path = os.path.join(self._folder.name, "vocabulary.model")
        if not os.path.exists(path):
            with open(path, "wb") as file:
                file.write(self.proto)
        return path


def sentinel(number: int) -> str:
    """The sentinel as T5 writes it."""
    return f"<extra_id_{number}>"


def own_sentinels(pieces: Sequence[str]) -> int:
    """How many sentinels stand at the end of the pieces, the last of them being sentinel 0."""
    count = 0
    while count < len(pieces) and pieces[-1 - count].removeprefix("▁") == sentinel(count):
        count += 1
    return count


def train_vocabulary(
    texts: Iterable[str],
    output_path: storage.PathLike,
    vocab_size: int,
    seed: int,
    *,
    character_coverage: float = 0.9995,
) -> Vocabulary:
    """Trains a unigram SentencePiece model with T5's special ids and writes it; deterministic.

    Args:
        texts: passages; each line of each is one sentence to the trainer.
        output_path: the ``.model`` file to write.
        vocab_size: number of trained pieces, special ids included, sentinels not.
        seed: of the trainer's random generator.
        character_coverage: share of the characters that must get a piece; the others are unknown.

    Returns:
        The vocabulary, with T5's sentinels added: `vocab_size` + 100 ids.

    Raises:
        InputError: the texts are too few for so many pieces.
    """
    sentences = (line.strip() for text in texts for line in text.split("\n"))
    buffer = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence for sentence in sentences if sentence),
            model_writer=buffer,
            vocab_size=vocab_size,
            model_type="unigram",
            pad_id=PAD_ID, eos_id=EOS_ID, unk_id=UNK_ID, bos_id=-1,
            byte_fallback=False,
            character_coverage=character_coverage,
            max_sentence_length=1 << 20,  # bytes; the trainer skips longer ones without a word
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise InputError(describe("The vocabulary cannot be trained", where=output_path, got=error,
                                  expected=f"texts that yield {vocab_size} pieces",
                                  cure="give more text or ask for fewer pieces")) from error
    output_path = storage.as_path(output_path)
    with storage.guard_writes(output_path):
        output_path.parent.mkdir(parents=True, exist_ok=True)
        output_path.write_bytes(buffer.getvalue())
    return Vocabulary.load(output_path)
