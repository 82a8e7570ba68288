"""Low-rank copies of networks, without a training."""

import torch

from oialr.convert import factorize_layer
from oialr.copies import copied
from oialr.layer_survey import survey
from oialr.linalg.svd import economy_svd


def low_rank(model, fraction=0.25, *, released=False, dense=(), **options):
    """Return a copy of a network in which every layer that can be is cut to a rank.

    Args:
        model: a dense network.
        fraction: of each layer's full rank.
        released: hold two factors, and not three.
        dense: names of weights that stay dense.
        options: of survey.
    """
    model = copied(model)
    for report in survey(model, **options):
        if report.stays_dense is not None or report.name in dense:
            continue
        weight = model.get_parameter(report.name).detach()
        U, s, Vh = economy_svd(weight.reshape(report.stack_shape))
        r = max(1, round(fraction * report.full_rank))
        U, s, Vh = U[..., :r], s[..., :r], Vh[..., :r, :]
        if released:
            root = s.sqrt()
            factors = (U * root[..., None, :], root[..., None] * Vh)
        else:
            factors = (U, torch.diag_embed(s), Vh)
        factorize_layer(model, report.name, *(factor.contiguous() for factor in factors))
    return model


def equal(one, two):
    """Tell whether two networks have the same parameters, bit for bit."""
    return all(map(torch.equal, one.parameters(), two.parameters()))
