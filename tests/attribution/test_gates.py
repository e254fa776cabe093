import itertools
import random

import pytest
import torch
import torch.nn as nn

from agrepa_fast import count_block_forwards, multi_gate
from agrepa_fast.attribution.gate_plan import prefix_order, single_ablations


class Residual(nn.Module):
    """A third party's block: its own residual sum, a per-row mask, a shared table, and a count of the rows it ran."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear, self.rows = nn.Linear(dim, dim), 0

    def forward(self, x, table, *, mask):
        self.rows += x.shape[0]
        return x + mask[:, None, None] * torch.tanh(self.linear(x) + table)


class Stack(nn.Module):
    """Blocks with a U-Net skip from the first to the last, so that stale rows would show."""

    def __init__(self, depth: int, dim: int = 6):
        super().__init__()
        self.blocks = nn.ModuleList(Residual(dim) for _ in range(depth))

    def forward(self, x, mask):
        table, skip = torch.linspace(-1, 1, x.shape[-1]), None
        for number, block in enumerate(self.blocks):
            if number == len(self.blocks) - 1 and skip is not None:
                x = x + 0.5 * skip
            x = block(x, table, mask=mask)
            skip = x if number == 0 else skip
        return x


def naive(model: Stack, x, mask, gates):
    """Each variant by its own loop over the blocks, really skipping what has gate 0."""
    outs = []
    for row in gates:
        h, skip, table = x, None, torch.linspace(-1, 1, x.shape[-1])
        for number, (block, g) in enumerate(zip(model.blocks, row, strict=True)):
            if number == len(model.blocks) - 1 and skip is not None:
                h = h + 0.5 * skip
            if g != 0:
                out = block(h, table, mask=mask)
                h = out if g == 1 else h + g * (out - h)
            skip = h if number == 0 else skip
        outs.append(h)
    return torch.stack(outs)


@pytest.mark.parametrize("trial", range(12))
def test_equals_a_naive_loop_on_random_gate_matrices(trial):
    draw = random.Random(trial)
    depth, variants, clips = draw.randint(1, 6), draw.randint(1, 7), draw.randint(1, 3)
    gates = torch.tensor([[draw.choice([0, 1, 1, 1, 0.25]) for _ in range(depth)] for _ in range(variants)])
    torch.manual_seed(trial)
    model, x, mask = Stack(depth), torch.randn(clips, 5, 6), torch.rand(clips)
    wanted = naive(model, x, mask, gates)
    for block in model.blocks:
        block.rows = 0
    max_rows = draw.choice([None, 1, clips, 2 * clips, 3 * clips + 1])
    with multi_gate(model.blocks, gates, row_arguments=["mask"], max_rows=max_rows, check_rows=False) as ran:
        got = model(x.repeat(variants, 1, 1), mask.repeat(variants)).unflatten(0, (variants, clips))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    prefixes = sum(len({tuple(row[:block].tolist()) for row in gates}) for block in range(depth))
    assert sum(ran) == count_block_forwards(gates) == prefixes
    assert sum(block.rows for block in model.blocks) == prefixes * clips


class Branches(nn.Module):
    """Attention-like and FFN-like branches, with the residual sum outside of them; the second is called by keyword."""

    def __init__(self, depth: int, dim: int = 6):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2 * depth))

    def forward(self, x, gates=None):
        for number, branch in enumerate(self.branches):
            out = branch(input=x) if number % 2 else branch(x)
            x = torch.tanh(x + (out if gates is None else gates[number] * out))
        return x


@pytest.mark.parametrize("trial", range(8))
def test_branches_equal_a_naive_loop_on_random_gate_matrices(trial):
    draw = random.Random(trial)
    depth, variants, clips = draw.randint(1, 4), draw.randint(1, 7), draw.randint(1, 3)
    gates = torch.tensor([[draw.choice([0, 1, 1, 1, 0.25]) for _ in range(2 * depth)] for _ in range(variants)])
    torch.manual_seed(trial)
    model, x = Branches(depth), torch.randn(clips, 5, 6)
    with multi_gate(model.branches, gates, kind="branch", max_rows=draw.choice([None, 1, 2 * clips])) as ran:
        got = model(x.repeat(variants, 1, 1)).unflatten(0, (variants, clips))
    wanted = torch.stack([model(x, row) for row in gates])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert sum(ran) == count_block_forwards(gates)


def test_a_branchs_output_is_scaled_and_exactly_zero_at_gate_zero():
    branch, x = nn.Linear(6, 6), torch.randn(2, 6)
    with torch.no_grad(), multi_gate([branch], torch.tensor([[1.0], [0.25], [0.0]]), kind="branch"):
        full, quarter, none = branch(x.repeat(3, 1)).unflatten(0, (3, 2))
    torch.testing.assert_close(quarter, 0.25 * full)
    assert torch.equal(none, torch.zeros_like(full))
    branch.weight.data.fill_(float("nan"))
    with torch.no_grad(), multi_gate([branch], torch.tensor([[1.0], [0.0]]), kind="branch"):
        full, none = branch(x.repeat(2, 1)).unflatten(0, (2, 2))
    assert full.isnan().all()
    assert torch.equal(none, torch.zeros_like(full))


def test_attention_and_ffn_of_24_blocks_apart_cost_588_block_forwards_worth_of_branches():
    assert count_block_forwards(single_ablations(2 * 24)) == 2 * 588


@pytest.mark.parametrize("trial", range(5))
def test_ordered_variants_run_as_a_slice(trial):
    draw = torch.Generator().manual_seed(trial)
    gates = (torch.rand(9, 5, generator=draw) > 0.4).float()
    gates = gates[prefix_order(gates)]
    for block in range(5):
        rows = [tuple(row[:block].tolist()) for row in gates]
        distinct = len(set(rows))
        assert len(set(rows[:distinct])) == distinct


def repeated(x: torch.Tensor, variants: int) -> torch.Tensor:
    return x.repeat(variants, *[1] * (x.ndim - 1))


class TestOrder:
    """Blocks may run in any order, and any number of times: a prefix is the gates of all that ran before."""

    @pytest.mark.parametrize("calls", [(0, 1, 1, 2), (1, 0, 2), (2, 1, 0), (0, 1, 2, 0), (0, 1, 2) * 3])
    @torch.no_grad()
    def test_equals_one_forward_per_variant(self, calls):
        torch.manual_seed(0)
        model, x, mask = Stack(3), torch.randn(2, 5, 6), torch.rand(2)
        gates = torch.tensor([[1, 1, 1], [1, 0, 1], [0.5, 1, 1], [1, 1, 0], [0, 0, 1]])
        table = torch.linspace(-1, 1, 6)
        with multi_gate(model.blocks, gates, row_arguments=["mask"]):
            got = repeated(x, 5)
            for number in calls:
                got = model.blocks[number](got, table, mask=repeated(mask, 5))
        wanted = []
        for row in gates:
            h = x
            for number in calls:
                h = h + row[number] * (model.blocks[number](h, table, mask=mask) - h)
            wanted.append(h)
        torch.testing.assert_close(got.unflatten(0, (5, 2)), torch.stack(wanted), atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_a_block_that_is_listed_twice_has_a_gate_per_call(self):
        torch.manual_seed(0)
        a, b = Stack(2).blocks
        x, table, mask, gates = torch.randn(2, 5, 6), torch.zeros(6), torch.ones(2), single_ablations(4)
        with multi_gate([a, b, a, b], gates, row_arguments=["mask"]) as ran:
            got = repeated(x, 5)
            for block in (a, b, a, b):
                got = block(got, table, mask=repeated(mask, 5))
        wanted = []
        for row in gates:
            h = x
            for block, gate in zip((a, b, a, b), row, strict=True):
                h = block(h, table, mask=mask) if gate else h
            wanted.append(h)
        torch.testing.assert_close(got.unflatten(0, (5, 2)), torch.stack(wanted), atol=1e-5, rtol=1e-5)
        assert sum(ran) == 10

    @pytest.mark.parametrize(
        ("calls", "message"),
        [
            ([], r"block 1 \(Residual\) of 3 never ran"),
            ([0, 1, 1], r"block 3 \(Residual\) of 3 never ran"),
        ],
    )
    def test_blocks_that_never_run(self, calls, message):
        model, x, mask = Stack(3), torch.randn(1, 5, 6), torch.ones(4)
        gated = multi_gate(model.blocks, single_ablations(3), row_arguments=["mask"])

        def run():
            for number in calls:
                model.blocks[number](repeated(x, 4), torch.zeros(6), mask=mask)

        with pytest.raises(ValueError, match=message), gated:
            run()

    def test_a_block_that_is_listed_twice_and_runs_once(self):
        (block,) = Stack(1).blocks
        gated = multi_gate([block, block], single_ablations(2), row_arguments=["mask"])
        with pytest.raises(ValueError, match="ran 1 times, but is listed 2 times"), gated:
            block(torch.randn(1, 5, 6).repeat(3, 1, 1), torch.zeros(6), mask=torch.ones(3))


class TestRefusals:
    def test_batch_statistics(self):
        block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        with pytest.raises(ValueError, match=r"block 1: 1 \(BatchNorm1d\)"), multi_gate([block], torch.ones(2, 1)):
            pass
        block.eval()
        with multi_gate([block], torch.ones(2, 1)):
            block(torch.randn(2, 6).repeat(2, 1))

    def test_attention_across_clips(self):
        class Mixing(nn.Module):
            def forward(self, x):
                return x + torch.softmax(x @ x.mT, -1) @ x

        blocks, gates = nn.ModuleList([nn.Linear(4, 4), Mixing()]), single_ablations(2)
        with pytest.raises(ValueError, match=r"block 2 \(Mixing\) cannot be gated exactly"), multi_gate(blocks, gates):
            blocks[1](blocks[0](torch.randn(2, 4).repeat(3, 1)))  # rows are clips: each attends to all

    @torch.no_grad()
    def test_variants_of_one_prefix_that_differ(self):
        """What a model does with rows between blocks must not depend on the other rows."""
        blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        message = r"block 2 \(Linear\) cannot be gated exactly: its argument 'input' differs between variants"
        x = torch.randn(2, 4).repeat(4, 1)
        with pytest.raises(ValueError, match=message), multi_gate(blocks, single_ablations(3)):
            blocks[1](blocks[0](x) + torch.linspace(0, 1e-3, 8)[:, None])

    @pytest.mark.parametrize(
        ("forward", "message"),
        [
            (lambda x, y: (x + 1, y + x), "returns an updated argument 'y' beside its state"),
            (lambda x, y: x[:, :2], r"makes \(2, 2, 3\) of \(2, 3, 3\)"),
            (lambda x, y: x.add_(1), "changes its input in place"),
            (lambda x, y: x + y, ": its state could be 'x' or 'y'; name it"),
            (lambda x, y: None, "returns no tensor"),
        ],
    )
    def test_blocks_that_have_no_gate(self, forward, message):
        class Odd(nn.Module):
            def forward(self, x, *, y):
                return forward(x, y)

        block, (x, y) = Odd(), torch.randn(2, 2, 3, 3)
        with (
            pytest.raises(ValueError, match=rf"block 1 \(Odd\)( )?{message}"),
            multi_gate([block], single_ablations(1)),
        ):
            block(repeated(x, 2), y=repeated(y, 2))

    def test_a_block_inside_another(self):
        outer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        gated = multi_gate([outer, outer[1]], single_ablations(2))
        with pytest.raises(ValueError, match=r"block 2 \(Linear\) runs inside block 1 \(Sequential\)"), gated:
            outer(torch.randn(2, 4).repeat(3, 1))

    def test_a_state_by_name_or_position(self):
        class Cross(nn.Module):
            def forward(self, context, x):
                return x + torch.tanh(context)

        block, (x, context) = Cross(), torch.randn(2, 2, 5, 7)
        wanted = torch.cat((x + torch.tanh(context), x))
        for state in ("x", 1):
            for call in (lambda c, x: block(c, x), lambda c, x: block(x=x, context=c)):
                with multi_gate([block], single_ablations(1), state=state):
                    assert torch.equal(call(repeated(context, 2), repeated(x, 2)), wanted)
        with pytest.raises(ValueError, match="has no tensor 'z'"), multi_gate([block], single_ablations(1), state="z"):
            block(repeated(context, 2), repeated(x, 2))

    def test_sequences_that_are_no_second_stream(self):
        """A mask or pooled vector of an argument's shape, and arguments handed on in whatever place."""

        class Fine(nn.Module):
            def forward(self, x, mask, pad, cond):
                return x + cond.unsqueeze(1), mask, x.sum(1)

        block, x, mask = Fine(), torch.randn(2, 5, 3).repeat(2, 1, 1), torch.ones(4, 5, 5)
        with multi_gate([block], single_ablations(1)):
            block(x, mask, torch.zeros(4, 5, 5), torch.randn(2, 3).repeat(2, 1))

    def test_a_second_stream_that_is_handed_on_is_fine(self):
        class PassesOn(nn.Module):
            def forward(self, x, y):
                return x + y, y

        block, x, y = PassesOn(), torch.randn(2, 3, 5), torch.randn(2, 3, 5)
        with multi_gate([block], single_ablations(1), row_arguments=[1]):
            state, other = block(x.repeat(2, 1, 1), y.repeat(2, 1, 1))
        assert torch.equal(state, torch.cat((x + y, x)))
        assert torch.equal(other, y.repeat(2, 1, 1))

    def test_a_row_argument_that_only_some_branches_have(self):
        class Attention(nn.Linear):
            def forward(self, x, mask):
                return mask * super().forward(x)

        branches, x, mask = nn.ModuleList([Attention(3, 3), nn.Linear(3, 3)]), torch.randn(2, 3), torch.rand(2, 1)
        with torch.no_grad(), multi_gate(branches, single_ablations(2), kind="branch", row_arguments=["mask"]):
            out = branches[0](x.repeat(3, 1), mask=mask.repeat(3, 1))
            out = branches[1](x.repeat(3, 1) + out)
        wanted = torch.stack((branches[1](x + branches[0](x, mask)), branches[1](x), torch.zeros(2, 3)))
        torch.testing.assert_close(out, wanted.flatten(0, 1))

    def test_a_row_argument_that_is_not_there(self):
        block, options = nn.Linear(3, 3), {"row_arguments": ["msak"]}
        gated = multi_gate([block], torch.ones(2, 1), **options)
        with pytest.raises(ValueError, match="no block has an argument 'msak', but 0, input"), gated:
            block(torch.randn(1, 3).repeat(2, 1))

    def test_dropout_left_on(self):
        blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(2)])
        with pytest.raises(ValueError, match="dropout left on"), multi_gate(blocks, single_ablations(2)):
            blocks[1](blocks[0](torch.randn(2, 4).repeat(3, 1)))
        blocks.eval()
        with multi_gate(blocks, single_ablations(2)):
            blocks[1](blocks[0](torch.randn(2, 4).repeat(3, 1)))

    def test_kind(self):
        with pytest.raises(ValueError, match="block or branch"), multi_gate([], torch.ones(2, 0), kind="brnch"):
            pass


@pytest.mark.parametrize("depth", [1, 8, 24])
def test_single_ablation_costs_l_l_plus_1_over_2(depth):
    assert count_block_forwards(single_ablations(depth)) == depth * (depth + 1) // 2


def test_gate_zero_is_the_input_bit_for_bit_even_after_a_block_that_is_not_finite():
    model, x = Stack(1), torch.randn(2, 5, 6)
    model.blocks[0].linear.weight.data.fill_(float("nan"))
    with multi_gate(model.blocks, torch.tensor([[0.0], [1.0]]), row_arguments=["mask"]):
        out = model(x.repeat(2, 1, 1), torch.ones(4))
    assert torch.equal(out[:2], x)
    assert out[2:].isnan().any()


def test_row_arguments_are_found_unless_a_table_could_be_mistaken_for_one():
    model, gates = Stack(3), single_ablations(3)
    x, mask = torch.randn(1, 5, 6), torch.rand(1)
    with multi_gate(model.blocks, gates):
        got = model(x.repeat(4, 1, 1), mask.repeat(4))  # 4 rows: no other dimension is 4
    torch.testing.assert_close(got, naive(model, x, mask, gates).flatten(0, 1), atol=1e-6, rtol=1e-6)
    x = torch.randn(1, 4, 6)  # 4 frames
    with pytest.raises(ValueError, match="'mask' has 4 rows"), multi_gate(model.blocks, gates):
        model(x.repeat(4, 1, 1), mask.repeat(4))


def test_tuple_outputs_hand_on_the_rest_per_variant():
    class Pair(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            return x + self.scale, x.sum(dim=1)

    blocks = nn.ModuleList([Pair(1.0), Pair(10.0)])
    x = torch.randn(2, 3)
    with multi_gate(blocks, single_ablations(2)):
        h, first = blocks[0](x.repeat(3, 1))
        h, second = blocks[1](h)
    torch.testing.assert_close(h, torch.cat((x + 11, x + 10, x + 1)))
    torch.testing.assert_close(first, x.sum(1).repeat(3))
    torch.testing.assert_close(second, torch.cat(((x + 1).sum(1), x.sum(1), (x + 1).sum(1))))


def test_blocks_are_as_before_afterwards_even_when_the_model_raises():
    model = Stack(2)
    x = torch.randn(3, 5, 6)
    with pytest.raises(ValueError, match="3 rows for 2 variants"), multi_gate(model.blocks, torch.ones(2, 2)):
        model(x, torch.ones(3))
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_gradients_flow_through_gates():
    model, x = Stack(3), torch.randn(2, 5, 6, requires_grad=True)
    with multi_gate(model.blocks, single_ablations(3), row_arguments=["mask"]):
        model(x.repeat(4, 1, 1), torch.ones(8)).square().sum().backward()
    wanted = torch.autograd.grad(naive(model, x, torch.ones(2), single_ablations(3)).square().sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gates", [torch.ones(2, 3), torch.ones(2), torch.full((2, 2), 1.5)])
def test_refuses_gates_that_do_not_fit(gates):
    with pytest.raises(ValueError, match="gates"), multi_gate(Stack(2).blocks, gates):
        pass


def test_every_subset_of_three_blocks():
    gates = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    assert count_block_forwards(gates) == 1 + 2 + 4
