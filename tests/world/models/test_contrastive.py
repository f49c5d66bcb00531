import torch
from torch.nn.functional import cross_entropy, normalize

from mmsae.world.models.contrastive import pair_loss


def naive(image, text, caption, scale):
    """All B x B logits, targets spread over equal captions."""
    logits = scale * image @ text[caption].T
    same = (caption[:, None] == caption).double()
    target = same / same.sum(1, keepdim=True)
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def test_pair_loss_equals_the_naive_one_in_value_and_gradient():
    g = torch.Generator().manual_seed(0)
    for caption in ([0, 1, 2, 3, 4, 5], [0, 0, 1, 2, 2, 2], [0] * 6):
        caption = torch.tensor(caption)
        image, text = (torch.randn(n, 5, generator=g, dtype=torch.float64) for n in (6, int(caption.max()) + 1))
        image, text = image.requires_grad_(), text.requires_grad_()
        scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
        got, want = (
            (loss, *torch.autograd.grad(loss, (image, text, scale)))
            for loss in (f(normalize(image, dim=1), normalize(text, dim=1), caption, scale) for f in (pair_loss, naive))
        )
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, atol=1e-12)
