"""What plant_faults.py plants in probes, selection and alignment, by test file, as in faults.py."""

GATES = "agrepa_fast/attribution/gates.py"
FOGA = "agrepa_fast/attribution/foga.py"
SCORES = "agrepa_fast/attribution/scores.py"
SELECTION = "agrepa_fast/attribution/selection.py"
STORAGE = "agrepa_fast/attribution/storage.py"
MEASURE = "agrepa_fast/training/measure.py"
CHOOSE = "agrepa_fast/training/choose.py"
ALIGNER = "agrepa_fast/training/aligner.py"
OBJECTIVES = "agrepa_fast/alignment/objectives.py"
HEADS = "agrepa_fast/alignment/heads.py"

# fmt: off
FAULTS = {
    "gates": [
        (
            GATES,
            "return out.unflatten(0, (-1, clips))[plan.on(out.device)[1]].flatten(0, 1)",
            "return out.unflatten(0, (clips, -1)).transpose(0, 1)[plan.on(out.device)[1]].flatten(0, 1)",
            "rows in clip-major order",
        ),
        (
            GATES,
            "return by_variant[plan.on(x.device)[0]].flatten(0, 1)",
            "return by_variant[: len(plan.first)].flatten(0, 1)",
            "the first rows run, not those of the prefixes",
        ),
        (
            GATES,
            "        if number != due:\n",
            "        if False:\n",
            "blocks in another order go unnoticed",
        ),
        (
            GATES,
            "prefix = [number.setdefault(key, len(number)) for key in zip(prefix, column, strict=True)]",
            "prefix = [number.setdefault(key, len(number)) for key in zip(prefix, map(bool, column), strict=True)]",
            "partial gates share the rows of gate 1",
        ),
        (
            GATES,
            "after[variant] = row if gate == 0 else row + gate * (after[variant] - row)",
            "after[variant] = row if gate == 0 else gate * (after[variant] - row)",
            "a partial gate forgets the residual",
        ),
        (
            GATES,
            "after[variant] = gate * after[variant] if gate else 0",
            "after[variant] = gate * after[variant]",
            "gate 0 multiplies a branch, where 0 times a value that is not finite remains",
        ),
        (
            GATES,
            "    gated = (_blend if is_block else _scale)(x, spread(_state(out)), plan, variants)\n",
            "    gated = _blend(x, spread(_state(out)), plan, variants)\n",
            "branches are gated as blocks",
        ),
        (
            GATES,
            "(x, spread(_state(out)), plan, variants)",
            "(x, x.unflatten(0, (variants, -1)).index_copy(0, plan.on(x.device)[0], "
            "_state(out).unflatten(0, (-1, clips))).flatten(0, 1), plan, variants)",
            "variants that did not run themselves keep stale rows",
        ),
        (
            GATES,
            "others = [spread(value) if _has_rows(value, len(plan.first) * clips) else value for value in out[1:]]",
            "others = list(out[1:])",
            "a tuple's other tensors keep the rows of the prefixes",
        ),
        (
            GATES,
            "part = {name: value[start : start + (chunk or rows)] for name, value in taken.items()}",
            "part = {name: value[: (chunk or rows)] for name, value in taken.items()}",
            "every chunk is the first",
        ),
        (
            GATES,
            "    if gating.check_rows and len(plan.first) > 1:\n",
            "    if False and len(plan.first) > 1:\n",
            "attention across clips goes unnoticed",
        ),
    ],
    "foga": [
        (FOGA, "    model.eval()\n", "    model.train()\n", "dropout left on"),
        (
            FOGA,
            "        for module, training in modes:\n            module.training = training\n",
            "        model.train()\n",
            "frozen parts come back in training mode",
        ),
        (
            FOGA,
            "v = v.unflatten(0, (variants, -1))[self.back]",
            "v = v.unflatten(0, (variants, -1))",
            "variants stay in the order in which they ran",
        ),
        (
            FOGA,
            "            program.load(batch.condition)\n",
            "",
            "a replay sees the conditions of the batch that was captured",
        ),
        (
            FOGA,
            "            if here != self._captured_at:\n",
            "            if not self._captured_at:\n                self._captured_at = here\n            if False:\n",
            "a graph goes on with weights that have moved",
        ),
        (
            FOGA,
            "[part for block in model.blocks for part in (block.attn, block.ffn)]",
            "[part for block in model.blocks for part in (block.ffn, block.attn)]",
            "gates applied to the wrong sub-block",
        ),
        (
            FOGA,
            "keys = probe_keys(seed, draw, batch.places",
            "keys = probe_keys(seed, 0, batch.places",
            "all draws have the same noise",
        ),
        (
            FOGA,
            "for left_out in range(0, depth, 2):",
            "for left_out in range(depth):",
            "the official recipe scores even layers, too",
        ),
        (
            FOGA,
            "if measured.floor.max() > SAME_ROWS.get(next(model.parameters()).dtype, 0.1):",
            "if False:",
            "a model that mixes clips is measured all the same",
        ),
        (
            SELECTION,
            "return mean - 2 * stderr > ABOVE_FLOOR * scores.floor_of(domain)",
            "return mean > 0",
            "a selection that ignores the floor",
        ),
        (
            SELECTION,
            "return mean - 2 * stderr > ABOVE_FLOOR * scores.floor_of(domain)",
            "return mean > ABOVE_FLOOR * scores.floor_of(domain)",
            "a selection that ignores the noise",
        ),
        (
            SELECTION,
            ".argsort(descending=True, stable=True)[:k]",
            ".argsort(descending=False, stable=True)[:k]",
            "the lowest layers are chosen",
        ),
        (
            SELECTION,
            "if scores.share_probability(domain, layers, share) >= confidence:",
            "if scores.share_probability(domain, layers, share) > 0:",
            "a share that one resample carries is enough",
        ),
        (
            SCORES,
            "picked = torch.randint(clips, (RESAMPLES, clips)",
            "picked = torch.arange(clips).expand(RESAMPLES, clips) + 0 * torch.randint(clips, (RESAMPLES, clips)",
            "the bootstrap draws every clip once",
        ),
        (
            "agrepa_fast/attribution/vjp.py",
            "branches.append((out - args[0]).detach())",
            "branches.append(out.detach())",
            "the estimate takes the state for the branch",
        ),
    ],
    "measure": [
        (
            MEASURE,
            "owned = [row for row, place in enumerate(places) if place <= last]",
            "owned = list(range(len(places)))",
            "a rank's clips counted twice",
        ),
        (
            MEASURE,
            "last = min((self.rank + 1) * share, len(self)) - 1",
            "last = len(self) - 1",
            "a rank answers for the next one's clips as well",
        ),
        (
            MEASURE,
            "values[:, place], floor[place], silent[place] = part.values[:, row], part.floor[row], part.silent[row]",
            "values[:, place], floor[place], silent[place] = part.values[:, 0], part.floor[row], part.silent[row]",
            "every clip gets the first one's scores",
        ),
        (MEASURE, "if len(self) < world:", "if False:", "more ranks than clips"),
        (
            MEASURE,
            "floor.new_full((1,), float(failure is not None))",
            "floor.new_full((1,), 0.0)",
            "one rank's failure is its own",
        ),
        (
            MEASURE,
            'x_t = batch.mel if recipe == "official" else noised(given, t, config.flow.sigma, 0, 0)',
            "x_t = batch.mel",
            "what layers store is measured at the clean mel",
        ),
        (
            MEASURE,
            "if (domain := int(batch.domain[row])) not in seen:",
            "if True:",
            "the official probe takes every clip",
        ),
        (
            MEASURE,
            "        self.measured.check(range(len(self.measured.floor)))\n",
            "",
            "scores that mean nothing are handed on",
        ),
    ],
    "choose": [
        (
            CHOOSE,
            "        if early and sure <= schedule.confidence:\n",
            "        if early and False:\n",
            "the first probe chooses",
        ),
        (
            CHOOSE,
            "        recent = self.probes\n",
            "        recent = []\n",
            "earlier probes are forgotten",
        ),
        (
            CHOOSE,
            "(step - selection.step) % align.refresh == 0",
            "(step - selection.step) % align.refresh == 1",
            "a refresh one step late",
        ),
        (
            CHOOSE,
            '            "pending": None if self.pending is None else asdict(self.pending),\n',
            '            "pending": None,\n',
            "a checkpoint loses the probe under way",
        ),
        (
            CHOOSE,
            "return align.refresh > 0 and",
            "return align.refresh >= 0 and step % 3 == 0 and",
            "a frozen set is measured again",
        ),
        (
            ALIGNER,
            "            self.optimizer.state.update({p: before.state[p] for p in parameters if p in before.state})\n",
            "            pass\n",
            "heads that stay lose their optimizer state",
        ),
        (
            HEADS,
            "kept = earlier is not None and name in earlier.heads",
            "kept = False",
            "heads that stay begin anew",
        ),
        (
            ALIGNER,
            "(stop is None or step < stop)",
            "(stop is None or step <= stop)",
            "the alignment stops one step late",
        ),
        (
            CHOOSE,
            "            return measure()\n        except ValueError as failure:\n",
            "            return measure()\n        except KeyError as failure:\n",
            "a failed probe takes the run down",
        ),
    ],
    "alignment": [
        (
            OBJECTIVES,
            "normed = F.layer_norm(pooled.float(), pooled.shape[-1:])",
            "normed = F.normalize(pooled.float(), dim=-1)",
            "BiT-C normalises by the length",
        ),
        (
            OBJECTIVES,
            "mask = mask if kept is None else mask & kept",
            "mask = mask",
            "BiT-C counts dropped tokens",
        ),
        (
            OBJECTIVES,
            "torch.where(mask, weights[name] * distance, 0)",
            "torch.where(mask, distance, 0)",
            "BiT-C without the domains' weights",
        ),
        (
            HEADS,
            "return torch.lerp(table[left], table[right], share.unsqueeze(1)).T.contiguous()",
            "return torch.lerp(table[right], table[left], share.unsqueeze(1)).T.contiguous()",
            "weights run backwards in time",
        ),
        (
            HEADS,
            "share = ((t - before) / (self.times[right] - before)).clamp(0, 1)",
            "share = (t - before) / (self.times[right] - before)",
            "weights go on beyond the probe's times",
        ),
        (
            "kernels/align_loss.py",
            "losses = (weights.float().view(heads, -1) * per_clip).sum(0)",
            "losses = (weights.float().view(heads, -1)[:, :1] * per_clip).sum(0)",
            "every clip gets the first one's weights",
        ),
        (
            SELECTION,
            "tuple(range(depth - align.k + 1, depth + 1))",
            "tuple(range(depth - align.k, depth))",
            "deep is one layer too high",
        ),
    ],
    "storage": [
        (
            STORAGE,
            "return _cosine(torch.where(opposite, -z, z), teacher)",
            "return _cosine(z, teacher)",
            "no sign anchor",
        ),
        (
            STORAGE,
            "opposite = (z * anchor).sum(-1, keepdim=True) < 0",
            "opposite = (z * anchor).sum((-1, -2), keepdim=True) < 0",
            "one sign anchor for all clips",
        ),
        (
            STORAGE,
            '_NORMS = {"corrected": _layer_norm, "official": _l2_norm}',
            '_NORMS = {"corrected": _l2_norm, "official": _layer_norm}',
            "the recipes' norms swapped",
        ),
        (
            STORAGE,
            "eigenvalues, vectors = torch.linalg.eigh(gram[:, ~held])",
            "eigenvalues, vectors = torch.linalg.eigh(gram[:, ~held] + 1e-2)",
            "ridge with another kernel",
        ),
        (
            STORAGE,
            "centred = [_centred(teacher, ~held) for held in held_out]",
            "centred = [_centred(teacher) for held in held_out]",
            "held-out clips centre the teacher",
        ),
        (
            STORAGE,
            "x = _standardised(hidden, ~held)",
            "x = _standardised(hidden, held | ~held)",
            "held-out clips standardise the features",
        ),
        (
            STORAGE,
            "    return centred * remains[..., None, None]\n",
            "    return gram * remains[..., None, None]\n",
            "biased HSIC",
        ),
        (
            STORAGE,
            "clips = (members == number).nonzero().squeeze(1)",
            "clips = (members >= 0).nonzero().squeeze(1)",
            "domains leak into each other",
        ),
    ],
}
