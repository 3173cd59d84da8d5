"""Rollouts that do not depend on how many ranks share them, so that runs with one and with several can be compared.

Each rank samples with random numbers of its own. With `FIXED_ROLLOUTS` at the end of a copy of
`trainer/shared_prefix_sampling.py`, the n-th completion of every group is sampled with the same numbers on every rank
(Gumbel-max).
"""

FIXED_ROLLOUTS = """

_sample = sample


class _SameNumbers:
    def __init__(self, width, group):
        self.width, self.group = width, group

    def __call__(self, ids, scores):
        generator = torch.Generator().manual_seed(ids.shape[1] - self.width)
        uniform = torch.rand(self.group, scores.shape[1], generator=generator)
        return scores - (-uniform.log()).log()[torch.arange(len(scores)) % self.group]


def sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **rest):
    if generation_config.do_sample:
        logits_processor.append(_SameNumbers(input_ids.shape[1], 8))
        generation_config.do_sample = False
    return _sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **rest)
"""
