"""Classification: batches, augmentation and metrics; and the estimation of batch-norm statistics."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from toys import blobs, finish, ready

from distprune.core.plan import Plan
from distprune.core.stages import Calibrate
from distprune.core.streams import stream
from distprune.core.tasks.classification import Classification, augment


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order() -> None:
    task = Classification(blobs())
    epochs = [torch.cat([task.batch(0, 0, clock, 32)[1] for clock in range(start, start + 10)]) for start in (0, 10)]
    assert all(torch.equal(epoch.sort().values, task.dataset.train.labels.sort().values) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_a_batch_is_a_function_of_its_arguments() -> None:
    task = Classification(blobs())
    first = task.batch(0, 1, 7, 32)
    task.batch(0, 0, 23, 32)
    assert torch.equal(first[0], task.batch(0, 1, 7, 32)[0])
    assert not torch.equal(first[0], task.batch(0, 2, 7, 32)[0]) and not torch.equal(first[0], task.batch(1, 1, 7, 32)[0])


def test_inputs_are_normalised() -> None:
    task = Classification(blobs())
    inputs = task.normalise(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
    torch.testing.assert_close(inputs.flatten(), torch.tensor([-2.0, 2.0]))


def test_augmented_images_are_crops_of_the_padded_ones() -> None:
    inputs = torch.arange(1.0, 2 * 3 * 6 * 5 + 1).view(2, 3, 6, 5)
    for kind, border in (("shift", 2), ("crop_flip", 4)):
        padded = F.pad(inputs, (border,) * 4)
        seen = set()
        for draw in range(30):
            out = augment(inputs, kind, stream(0, "test", draw))
            assert out.shape == inputs.shape
            for image, source in zip(out, padded, strict=True):
                places = [
                    (row, column, flip)
                    for row in range(2 * border + 1)
                    for column in range(2 * border + 1)
                    for flip in (False, True)
                    if torch.equal(image.flip(-1) if flip else image, source[:, row : row + 6, column : column + 5])
                ]
                assert places, "every image is a crop, all channels alike"
                seen.add(places[0])
        assert len(seen) > 10 and any(flip for _, _, flip in seen) == (kind == "crop_flip")


def test_metrics_by_hand_and_the_mode_is_left() -> None:
    task = Classification(blobs())

    class Always(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            assert not self.training
            return F.one_hot(torch.full((len(inputs),), 3), 10).float()

    model = Always().train()
    share = (task.dataset.validation.labels == 3).double().mean().item()
    assert task.metrics(model, "validation")["accuracy"] == share and model.training


def test_calibration_is_the_mean_over_its_batches() -> None:
    run = ready("dense")
    finish(run)
    norm = run.state.model[1]  # type: ignore[index]
    norm.running_mean.fill_(7.0)
    calibrated = Calibrate(batches=4, batch_size=32)
    seen: list[torch.Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean((0, 2, 3))))
    state = run.state
    state.stage, before = 0, state.ledger.scoring
    finish(replace(run, plan=Plan([calibrated])))
    handle.remove()
    torch.testing.assert_close(norm.running_mean, torch.stack(seen[:4]).mean(0))
    assert norm.momentum == 0.1 and state.ledger.scoring - before == 4 * 32
