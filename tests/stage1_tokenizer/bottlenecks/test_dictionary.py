"""Sparse coding over atoms: losses and gradients, ISTA against its optimality conditions, the limit, what it learns."""

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.bottlenecks.dictionary import Dictionary, DictionaryConfig, largest_eigenvalue

D, ATOMS = 8, 24
Code = Literal["softmax", "ista"]
CODES: tuple[Code, ...] = ("softmax", "ista")


def dictionary(**options: Any) -> Dictionary:
    torch.manual_seed(0)
    made = Dictionary(DictionaryConfig(**{"atoms": ATOMS, "top": 6, **options}), D)
    if made.config.code == "softmax":
        with torch.no_grad():  # logits that differ from atom to atom
            made.map.weight.mul_(1.5)
    return made


def latents(B: int = 4, h: int = 5, w: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(B, D, h, w, generator=torch.Generator().manual_seed(seed))


def flat(z: Tensor) -> Tensor:
    return rearrange(z, "B d h w -> (B h w) d")


def backward(made: Dictionary, z: Tensor) -> tuple[Bottlenecked, Tensor, list[Tensor]]:
    """The forward pass, the gradient of its loss at z, and at the parameters."""
    made.zero_grad()
    leaf = z.clone().requires_grad_()
    out = made(leaf)
    out.loss.backward()
    assert leaf.grad is not None
    return out, leaf.grad, [p.grad.clone() for p in made.parameters() if p.grad is not None]


def coefficients_of(made: Dictionary, z: Tensor) -> Tensor:
    """(N, atoms) as the module finds them; z_dl is checked to be made of them in the tests of loss and output."""
    with torch.no_grad():
        return (made._ista if made.config.code == "ista" else made._softmax)(flat(z), made.atoms)


@pytest.mark.parametrize("code", CODES)
def test_beta_weighs_the_commitment_alone(code: Code) -> None:
    """Trap 1: beta scales the pull on the encoder, and neither what atoms nor what the linear map learn."""
    z, seen = latents(), {}
    for beta in (0.0, 0.25, 1.0):
        _, at_z, at_parameters = backward(dictionary(code=code, beta=beta), z)
        seen[beta] = at_z, at_parameters
    assert torch.equal(seen[0.0][0], torch.zeros_like(z))
    assert seen[0.25][0].abs().max() > 0
    assert torch.allclose(seen[1.0][0], 4 * seen[0.25][0])
    assert len(seen[0.0][1]) == (3 if code == "softmax" else 1)
    for unweighted, weighted in zip(seen[0.0][1], seen[1.0][1], strict=True):
        assert unweighted.abs().max() > 0
        assert torch.equal(unweighted, weighted)


@pytest.mark.parametrize("code", CODES)
def test_the_loss_is_the_three_terms(code: Code) -> None:
    """Reconstruction and commitment are mean squares over D; the sparsity term is on their scale."""
    z = latents()
    made = dictionary(code=code, l1=0.3, beta=0.25)
    out, at_z, _ = backward(made, z)
    apart = z - out.z_q
    a = coefficients_of(made, z)
    half_squares = 0.5 * flat(apart).square().sum(dim=1)  # (N,)
    objective = (half_squares + 0.3 * a.abs().sum(dim=1)).mean()
    assert torch.allclose(out.loss, 2 / D * objective + 0.25 * apart.square().mean())
    assert torch.allclose(at_z, 0.25 * 2 * apart / z.numel(), atol=1e-8)
    assert torch.allclose(flat(out.z_q), a @ made.atoms, atol=1e-6)


@pytest.mark.parametrize("code", CODES)
def test_the_gradient_of_the_atoms_is_that_of_fixed_coefficients(code: Code) -> None:
    """d/dA |z - a A|^2 by hand, through the atoms' length of one: along an atom itself there is no gradient."""
    z = latents()
    made = dictionary(code=code, beta=0.7)
    _, _, gradients = backward(made, z)
    raw = made.raw_atoms.detach().double()
    length = raw.norm(dim=1, keepdim=True)
    unit = raw / length
    a = coefficients_of(made, z).double()
    at_unit = -2 * a.T @ (flat(z).double() - a @ unit) / z.numel()
    expected = (at_unit - (at_unit * unit).sum(1, keepdim=True) * unit) / length
    assert torch.allclose(gradients[0].double(), expected, atol=1e-7)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("training", [True, False])
def test_straight_through(code: Code, training: bool) -> None:
    """Trap 2: forward exactly a A, also far from the origin; backward the decoder's gradient at z as it is."""
    made = dictionary(code=code).train(training)
    z = (1e3 * latents()).requires_grad_()
    out = made(z)
    a = coefficients_of(made, z.detach())
    assert torch.equal(flat(out.z_q), a @ made.atoms)
    gradient = torch.randn_like(z)
    out.z_q.backward(gradient)
    assert z.grad is not None
    assert torch.equal(z.grad, gradient)
    assert all(parameter.grad is None for parameter in made.parameters())
    assert out.codes is None
    assert (made.depth, made.noise_channels) == (0, 0)


def slow_lasso(z: Tensor, atoms: Tensor, l1: float, sweeps: int = 400) -> Tensor:
    """The minimum of 1/2 |z - a A|^2 + l1 |a|_1 for one z (D,), float64, by coordinate descent: (atoms,)."""
    a = torch.zeros(len(atoms), dtype=torch.float64)
    residual = z.clone()
    for _ in range(sweeps):
        for k, atom in enumerate(atoms):
            pull = float(atom @ residual) + float(a[k])  # atoms have length one
            new = max(abs(pull) - l1, 0.0) * (1.0 if pull > 0 else -1.0)
            residual += (float(a[k]) - new) * atom
            a[k] = new
    return a


def test_ista_finds_what_a_slow_solver_finds() -> None:
    """Another algorithm in float64, coordinate by coordinate, comes to the same coefficients."""
    made = dictionary(code="ista", top=ATOMS, ista_steps=3000, l1=0.3)
    z = latents(B=1, h=2, w=2)
    found = coefficients_of(made, z).double()
    atoms = made.atoms.detach().double()
    for vector, a in zip(flat(z).double(), found, strict=True):
        assert torch.allclose(a, slow_lasso(vector, atoms, 0.3), atol=2e-4)


@pytest.mark.parametrize("l1", [0.3, 1.0, 2.0])
def test_ista_ends_at_the_optimality_conditions(l1: float) -> None:
    """KKT: an atom in use correlates with the residual by exactly l1 and its sign, any other one by l1 at the most."""
    made = dictionary(code="ista", top=ATOMS, ista_steps=3000, l1=l1)
    z = flat(latents())
    a = coefficients_of(made, latents())
    correlation = (z - a @ made.atoms) @ made.atoms.T  # (N, atoms)
    used = a != 0
    assert 0 < used.float().mean() < 1
    assert (correlation[used] - l1 * a[used].sign()).abs().max() < 1e-3
    assert correlation[~used].abs().max() < l1 + 1e-3


def test_ista_never_raises_its_objective() -> None:
    """A step longer than 1/L may diverge: with nearly parallel atoms L is large, and each step must still help."""
    made = dictionary(code="ista", top=ATOMS, l1=0.1)
    with torch.no_grad():
        made.raw_atoms.copy_(torch.ones(ATOMS, D) + 0.05 * torch.randn(ATOMS, D))
    z, atoms, before = latents(), made.atoms.detach(), torch.inf
    for steps in (1, 2, 3, 5, 10, 50):
        made.config = made.config.model_copy(update={"ista_steps": steps})
        a = coefficients_of(made, z)
        objective = float((0.5 * (flat(z) - a @ atoms).square().sum(1) + 0.1 * a.abs().sum(1)).mean())
        assert objective < before
        before = objective


@pytest.mark.parametrize("size", [1, 2, 64, 256])
@pytest.mark.parametrize("rank", [1, 500])
@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_bound_of_the_largest_eigenvalue(size: int, rank: int, scale: float) -> None:
    """Never below the true one, or ISTA could diverge; not far above it, or it would take more steps."""
    rows = scale * torch.randn(rank, size, generator=torch.Generator().manual_seed(size))
    exact = float(torch.linalg.eigvalsh((rows.T @ rows).double())[-1])
    bound = float(largest_eigenvalue(rows.T @ rows))
    assert exact * (1 - 1e-5) <= bound <= 1.2 * exact


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("top", [1, 5, ATOMS])
def test_no_position_has_more_atoms_than_top(code: Code, top: int) -> None:
    """The limit is the point of the bottleneck; the log says how many are active, and which share of the dictionary."""
    made = dictionary(code=code, top=top, l1=1e-4, ista_steps=50)
    z = latents()
    used = coefficients_of(made, z) != 0
    assert used.sum(dim=1).max() == top
    stats = made(z).stats
    assert torch.allclose(stats["active_atoms_per_position"], used.float().sum(1).mean())
    assert torch.allclose(stats["atoms_in_use"], used.any(0).float().mean())
    assert torch.allclose(stats["mean_coefficient"], coefficients_of(made, z).abs().mean())


@pytest.mark.parametrize("code", CODES)
def test_ties_do_not_pass_the_limit(code: Code) -> None:
    """Copies of one atom have equal coefficients; a comparison with the smallest of the largest would keep them all."""
    made = dictionary(code=code, top=3, l1=1e-4)
    with torch.no_grad():
        made.raw_atoms.copy_(torch.ones(ATOMS, D))
        if code == "softmax":
            made.map.weight.zero_()
            made.map.bias.zero_()
    a = coefficients_of(made, latents().abs())
    assert (a != 0).sum(dim=1).tolist() == [3] * len(a)
    assert (a.abs().amax(1) == a.abs().sort(dim=1).values[:, -3]).all(), "these are ties"


@pytest.mark.parametrize("code", CODES)
def test_what_is_kept_are_the_largest(code: Code) -> None:
    """Against all coefficients, sorted: softmax weights are renormalised, ISTA's are left as they are."""
    cut, whole = (coefficients_of(dictionary(code=code, top=top, ista_steps=50), latents()) for top in (4, ATOMS))
    for some, every in zip(cut, whole, strict=True):
        largest = every.abs().sort(descending=True).indices[:4]
        expected = torch.zeros_like(every)
        expected[largest] = every[largest]
        if code == "softmax":
            expected *= some.sum() / expected.sum()
            assert some.sum() > 0
            assert (some >= 0).all()
        assert torch.allclose(some, expected, atol=1e-6)


def test_softmax_is_the_best_amplitude_times_shares() -> None:
    """Shares sum to one, and of unit atoms reach no z longer than one; the amplitude is the best of a fine grid."""
    made = dictionary(top=ATOMS, l1=0.2)
    z = 0.7 * flat(latents())
    logits = F.normalize(z, dim=1) * D**0.5 @ made.map.weight.detach().T + made.map.bias.detach()
    shares = logits.exp() / logits.exp().sum(1, keepdim=True)
    with torch.no_grad():
        a = made._softmax(z, made.atoms)
    amplitude = a.sum(1)
    assert torch.allclose(a, amplitude[:, None] * shares, atol=1e-6)
    u = shares @ made.atoms.detach()
    grid = torch.linspace(0, 3 * float(amplitude.max()), 4000)
    objective = 0.5 * (z[:, None] - grid[:, None] * u[:, None]).square().sum(-1) + 0.2 * grid  # (N, 4000)
    assert (amplitude - grid[objective.argmin(1)]).abs().max() < 2 * float(grid[1])
    assert amplitude.max() > 1


def test_long_latents_are_reached_from_the_start() -> None:
    """Before any training z_dl points where z does, at its length: the decoder sees the image from step 0."""
    torch.manual_seed(0)
    made = Dictionary(DictionaryConfig(l1=0.0), 64)
    for length in (0.1, 1.0, 30.0):
        z = length * torch.randn(2, 64, 4, 4)
        assert (made(z).z_q - z).square().mean() < 0.5 * z.square().mean()


@pytest.mark.parametrize("code", CODES)
def test_the_length_of_the_raw_atoms_does_not_matter(code: Code) -> None:
    """Else l1 is escaped by long atoms and small coefficients: twice the length must cost and give the same."""
    made, z = dictionary(code=code), latents()
    before = made(z)
    with torch.no_grad():
        made.raw_atoms.mul_(torch.rand(ATOMS, 1) * 10 + 0.1)
    after = made(z)
    assert torch.allclose(made.atoms.norm(dim=1), torch.ones(ATOMS))
    assert torch.allclose(after.loss, before.loss)
    assert torch.allclose(after.z_q, before.z_q, atol=1e-5)


def planted(n: int = 600, active: int = 2, seed: int = 5) -> tuple[Tensor, Tensor]:
    """A true dictionary (12, D) and vectors (n, D, 1, 1) that are positive sums of two of its atoms."""
    generator = torch.Generator().manual_seed(seed)
    true = F.normalize(torch.randn(12, D, generator=generator), dim=-1)
    chosen = torch.rand(n, 12, generator=generator).topk(active, dim=1).indices
    a = torch.zeros(n, 12).scatter(1, chosen, 2 + torch.rand(n, active, generator=generator))
    return true, (a @ true)[:, :, None, None]


def agreement(made: Dictionary, true: Tensor) -> float:
    """Mean over the true atoms of the cosine (without sign) of the nearest learned one."""
    return float((true @ made.atoms.detach().T).abs().amax(dim=1).mean())


@pytest.mark.parametrize(("code", "wanted", "error"), [("ista", 0.95, 0.1), ("softmax", 0.8, 0.2)])
def test_it_recovers_a_planted_dictionary(code: Code, wanted: float, error: float) -> None:
    """Vectors made of known atoms give those atoms back, which chance does not: it learns by its own loss alone."""
    true, z = planted()
    made = dictionary(code=code, atoms=16, top=4, l1=0.1, ista_steps=30)
    assert agreement(made, true) < wanted - 0.05
    optimizer = torch.optim.Adam(made.parameters(), lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        made(z).loss.backward()
        optimizer.step()
    assert agreement(made, true) > wanted
    out = made(z)
    assert (out.z_q - z).square().mean() < error * z.var()


def test_more_l1_is_fewer_atoms_or_smaller_ones() -> None:
    """The weight l1 acts in ISTA's threshold and in the softmax's loss; unused, a sweep over it would do nothing."""
    few, many = (dictionary(code="ista", top=ATOMS, l1=l1)(latents()).stats for l1 in (1.0, 0.01))
    assert few["active_atoms_per_position"] < 0.7 * many["active_atoms_per_position"]
    assert few["mean_coefficient"] < many["mean_coefficient"]
    z = latents()
    kept = {}
    for l1 in (0.0, 1.0):
        made = dictionary(l1=l1)
        optimizer = torch.optim.Adam(made.map.parameters(), lr=0.02)
        for _ in range(50):
            optimizer.zero_grad()
            made(z).loss.backward()
            optimizer.step()
        kept[l1] = made(z).stats["mean_coefficient"]
    assert kept[1.0] < 0.7 * kept[0.0]


@pytest.mark.parametrize("code", CODES)
def test_autocast_changes_nothing(code: Code) -> None:
    """Trap 6: in bf16 other atoms would be the largest, and a resumed or validated run would differ from training."""
    made, z = dictionary(code=code), latents()
    plain = made(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = flat(z) @ made.atoms.T
        cast = made(z)
    assert rough.dtype == torch.bfloat16
    assert cast.loss.dtype == torch.float32
    assert torch.equal(cast.z_q, plain.z_q)
    assert torch.equal(cast.loss, plain.loss)


@pytest.mark.parametrize("code", CODES)
def test_each_position_is_coded_by_itself(code: Code) -> None:
    """Row by row and image by image the same as all at once, at the same place: no mix-up of (B, h, w)."""
    made, z = dictionary(code=code).eval(), latents(B=2, h=3, w=4)
    whole = made(z).z_q
    assert whole.shape == z.shape
    for b in range(2):
        for i in range(3):
            for j in range(4):
                one = made(z[b : b + 1, :, i : i + 1, j : j + 1]).z_q
                assert torch.allclose(one[0, :, 0, 0], whole[b, :, i, j], atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"atoms": 16, "top": 17}, r"top \(17\) must not be more than atoms \(16\)"),
        ({"top": 0}, "top"),
        ({"l1": -0.1}, "l1"),
        ({"code": "omp"}, "softmax.*ista"),
        ({"ista_steps": 0}, "ista_steps"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    """Before anything is built, with both numbers in the message."""
    with pytest.raises(ValueError, match=message):
        DictionaryConfig(**wrong)
