"""Priors: drawing a code, generating a sequence, guidance, and loading a file."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, TokenShape
from stage2_prior.base import Prior
from stage2_prior.class_labels import parse_class
from stage2_prior.generation import draw_codes, generate, sample_softmax
from stage2_prior.guidance import Guidance
from stage2_prior.likelihood import image_nats
from stage2_prior.prior import PRIOR_FILE, load_prior
from tests.helpers.artefacts import MAKERS, edit_weights, noise_of, write_prior, write_tokenizer

SHAPE = TokenShape(2, 3, 1, 16)
KINDS = pytest.mark.parametrize("kind", MAKERS)
LAST = math.nextafter(1.0, 0.0)


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    expected = probabilities.double() * counts.sum()
    assert expected.min() > 10, "chi-square wants more than a few expected in each cell"
    return float(((counts - expected) ** 2 / expected).sum())


def logits_seen(model: Prior, labels: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
    """The codes that are generated, and the logits (B, L, V) from which they were chosen."""
    seen = []

    def choose(logits: Tensor, noise: Tensor, progress: float) -> Tensor:
        seen.append(logits)
        return sample_softmax(logits, noise, progress)

    codes = generate(model, labels, noise_of(len(labels), model.shape.length), choose, Guidance(guidance))
    return codes, torch.stack(seen, dim=1)


def test_draw_inverts_the_distribution_function() -> None:
    """Trap 29: each token owns a half-open interval as long as its probability; a step to the side loses a token."""
    row = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    below = [math.nextafter(edge, 0.0) for edge in (0.25, 0.75, 1.0)]
    noise = torch.tensor([0.0, 0.1, below[0], 0.25, 0.5, below[1], 0.75, below[2]], dtype=torch.float64)
    assert draw_codes(row.expand(8, -1), noise).tolist() == [1, 1, 1, 3, 3, 3, 4, 4]


def test_draw_is_that_of_a_slow_reference() -> None:
    """Trap 29: exact fractions say which token it must be; the sum of the row need not be one."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randint(0, 8, (300, 9), generator=generator).float() / 16
    probabilities[:, 4] += 1 / 16
    noise = torch.randint(0, 2**20, (300,), generator=generator).double() / 2**20
    for row, u, token in zip(
        probabilities.tolist(), noise.tolist(), draw_codes(probabilities, noise).tolist(), strict=True
    ):
        target, mass = Fraction(u) * sum(map(Fraction, row)), Fraction(0)
        passed = []
        for share in row:
            mass += Fraction(share)
            passed.append(mass > target)
        assert token == passed.index(True)


def test_a_large_codebook_is_drawn_from_evenly() -> None:
    """Trap 29: sums of 50,000 small probabilities in float32 blur their borders; token i owns [i, i + 1) / V."""
    size, ids = 50_000, torch.arange(0, 50_000, 997)
    noise = (ids.double() + 1e-4) / size
    assert torch.equal(draw_codes(torch.full((len(ids), size), 1 / size), noise), ids)


@pytest.mark.parametrize("noise", [0.0, LAST, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_of_probability_zero_is_never_drawn(noise: float, dtype: torch.dtype) -> None:
    """Trap 33: filters work by setting probabilities to 0, and rounding at either end must not undo that."""
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.rand(5_000, 9, generator=generator, dtype=dtype) ** 4
    probabilities *= torch.rand(5_000, 9, generator=generator) < 0.4
    probabilities[:, 3] += 1e-20  # at least one is possible, however unlikely
    probabilities[:, [0, -1]] = 0.0
    tokens = draw_codes(probabilities, torch.full((5_000,), noise, dtype=torch.float64))
    assert (probabilities.gather(1, tokens[:, None]) > 0).all()


@KINDS
@pytest.mark.parametrize(("shape", "n"), [(TokenShape(1, 2, 1, 5), 20_000), (TokenShape(1, 2, 2, 3), 20_000)], ids=str)
def test_samples_have_the_frequencies_of_their_likelihood(kind: str, shape: TokenShape, n: int) -> None:
    """Traps 28 and 29: likelihoods of all images sum to one and samples follow them, so scoring and sampling agree on
    one factorisation, over positions and over the K codes of each (x-transformers keeps a tenth of the top)."""
    model = MAKERS[kind](shape, 2, seed=3)
    every = torch.cartesian_prod(*[torch.arange(shape.V)] * shape.length)  # (V**L, L)
    label = torch.ones((), dtype=torch.int64)
    images = rearrange(every, "n (h w K) -> n h w K", h=shape.h, w=shape.w)
    spread = model(images, label.expand(len(every))).std()
    for output in (weight for name, weight in model.head.named_parameters() if "output" in name):
        output.mul_(0.5 / spread)
    probabilities = (-image_nats(model, images, label.expand(len(every)))).exp()
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-5)
    assert probabilities.max() > 3 * probabilities.min(), "a uniform prior would prove little"
    codes = generate(model, label.expand(n), noise_of(n, shape.length))
    powers = shape.V ** torch.arange(shape.length - 1, -1, -1)
    counts = torch.bincount((codes.flatten(1) * powers).sum(dim=1), minlength=len(every))
    # Wilson and Hilferty's bound of chi-square: more than 4 deviations happens once in 30,000 times.
    degrees = len(every) - 1
    assert chi_square(counts, probabilities) < degrees * (1 - 2 / (9 * degrees) + 4 * (2 / (9 * degrees)) ** 0.5) ** 3


@KINDS
def test_a_sequence_follows_from_its_own_noise(kind: str) -> None:
    """Trap 36: the same labels and noise give the same codes in a batch of any size."""
    model, labels, noise = MAKERS[kind](SHAPE), torch.arange(12) % 2, noise_of(12, SHAPE.length)
    together = generate(model, labels, noise)
    parts = [generate(model, part, u) for part, u in zip(torch.split(labels, 5), torch.split(noise, 5), strict=True)]
    assert torch.equal(torch.cat(parts), together)
    assert len(set(map(str, together.tolist()))) == 12


@KINDS
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 1.0 + 1e-9, 3.0])
def test_guidance_mixes_logits(kind: str, guidance: float) -> None:
    """Trap 32: uncond + s (cond - uncond), where both have seen the same codes; the label is all that differs."""
    model, labels = MAKERS[kind](SHAPE), torch.arange(8) % 2
    codes, seen = logits_seen(model, labels, guidance)
    conditional = model(codes, labels)
    unconditional = model(codes, torch.full_like(labels, model.null_label))
    assert not torch.allclose(conditional, unconditional, atol=0.1)
    assert torch.allclose(seen, unconditional + guidance * (conditional - unconditional), rtol=1e-5, atol=1e-4)


@KINDS
def test_guidance_1_is_conditional_and_0_is_not(kind: str) -> None:
    """Trap 32: the tokens at scale 1 are those of the class, at scale 0 those of no class, whatever class was asked."""
    model, labels = MAKERS[kind](SHAPE), torch.arange(16) % 2
    noise = noise_of(16, SHAPE.length)
    conditional = generate(model, labels, noise, guidance=Guidance(1.0 + 1e-12))
    assert torch.equal(conditional, generate(model, labels, noise))
    without = generate(model, torch.full_like(labels, model.null_label), noise)
    assert torch.equal(generate(model, labels, noise, guidance=Guidance(0.0)), without)
    assert not torch.equal(conditional, without)


@pytest.mark.parametrize(("classes", "label_dropout", "reason"), [(2, 0.0, "label_dropout 0"), (0, 0.1, "no classes")])
@KINDS
def test_guidance_needs_a_prior_that_knows_no_class(kind: str, classes: int, label_dropout: float, reason: str) -> None:
    """Trap 32: the row of "no class" was never trained there, and mixing with it would be mixing with noise."""
    model = MAKERS[kind](SHAPE, classes, label_dropout=label_dropout)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ConfigError, match=rf"guidance 2\.0.*{reason}.*use guidance 1"):
        generate(model, labels, noise_of(2, SHAPE.length), guidance=Guidance(2.0))
    assert generate(model, labels, noise_of(2, SHAPE.length), guidance=Guidance(1.0)).shape == (2, *SHAPE[:3])


@KINDS
def test_no_label_is_dropped_outside_training(kind: str) -> None:
    """Trap 32: with label dropout of almost 1, the class that is asked for is still the class that is sampled."""
    model, other = MAKERS[kind](SHAPE, label_dropout=0.999), MAKERS[kind](SHAPE, label_dropout=0.0)
    labels = torch.arange(6) % 2
    codes, seen = logits_seen(model, labels, guidance=1.0)
    assert torch.allclose(seen, other(codes, labels), rtol=1e-5, atol=1e-5)


@KINDS
def test_a_loaded_prior_is_the_saved_one(tmp_path: Path, kind: str) -> None:
    """Traps 25 and 43: the weights come back bit for bit, in eval mode and frozen, with all that goes with them."""
    prior = write_prior(tmp_path, kind=kind, dropout=0.5)
    again = load_prior(tmp_path / PRIOR_FILE)
    assert again.classes == ("cat", "dog")
    assert again.tokenizer.fingerprint == prior.tokenizer.fingerprint
    assert again.model.shape == again.tokenizer.tokenizer.shape
    assert again.step == 9
    assert not again.model.training
    assert not any(parameter.requires_grad for parameter in again.model.parameters())
    original = MAKERS[kind](prior.model.shape, dropout=0.5)
    assert type(again.model) is type(original)
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in again.model.state_dict().items())


def test_a_prior_beside_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """Trap 25 and fault 35: codes mean something to the tokenizer that made them alone; both fingerprints are shown."""
    prior = write_prior(tmp_path)
    other = write_tokenizer(tmp_path, seed=1)
    assert other.fingerprint != prior.tokenizer.fingerprint
    with pytest.raises(BadFileError, match=rf"{prior.tokenizer.fingerprint}.*{other.fingerprint}"):
        load_prior(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    """Trap 43: the message names the key and both shapes."""
    write_prior(tmp_path)
    edit_weights(tmp_path / PRIOR_FILE, **{"head.output.weight": torch.zeros(17, 24)})
    with pytest.raises(BadFileError, match=r"head.output.weight is \(17, 24\), should be \(16, 24\)"):
        load_prior(tmp_path)


def test_a_missing_prior_is_named(tmp_path: Path) -> None:
    """A wrong path must say which option it came by, and whether the folder or the file is not there."""
    with pytest.raises(ConfigError, match=rf"--prior {tmp_path / 'x'}: there is no such"):
        load_prior(tmp_path / "x")
    with pytest.raises(ConfigError, match=rf"--prior {tmp_path}: .* no {PRIOR_FILE}"):
        load_prior(tmp_path)


def test_a_missing_tokenizer_is_named_by_the_option_that_was_given(tmp_path: Path) -> None:
    """The error names --prior, the option that was given, and not --tokenizer."""
    write_prior(tmp_path)
    (tmp_path / TOKENIZER_FILE).unlink()
    with pytest.raises(ConfigError, match=f"--prior.*{TOKENIZER_FILE}"):
        load_prior(tmp_path)


def test_a_class_has_a_name_and_a_number() -> None:
    """Trap 34: a name comes first, since a class may be called by a number which is not its label's."""
    assert [parse_class(name, ("cat", "dog")) for name in ("cat", "dog", "0", "1")] == [0, 1, 0, 1]
    assert [parse_class(name, ("7", "1", "0")) for name in ("7", "1", "0")] == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"classes are: 1, 2, 10$"):  # a number would be another class than it says
        parse_class("0", ("1", "2", "10"))


def test_a_class_is_found_in_either_normal_form() -> None:
    """A Mac writes an accent as a character of its own, and most keyboards do not."""
    for typed in ("caf\u00e9", "cafe\u0301"):
        for kept in ("caf\u00e9", "cafe\u0301"):
            assert parse_class(typed, ("a,b", kept)) == 1


@pytest.mark.parametrize("name", ["bird", "2", "-1", "", "Cat", "1.0"])
def test_an_unknown_class_lists_the_known_ones(name: str) -> None:
    """Trap 34: a negative number would wrap to the last class, one past the end would be the class of no class."""
    with pytest.raises(ConfigError, match="0 cat, 1 dog"):
        parse_class(name, ("cat", "dog"))
    with pytest.raises(ConfigError, match="unconditional"):
        parse_class(name, ())


def test_a_superscript_is_no_number() -> None:
    """An odd key stroke is a usage error like any other, not a traceback."""
    with pytest.raises(ConfigError, match="0 cat, 1 dog"):
        parse_class("²", ("cat", "dog"))
