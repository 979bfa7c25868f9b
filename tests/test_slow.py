"""What takes minutes: `make test-slow`."""

import pytest

from contrastive_core.data import mnist5k
from cpc.demo import few_label_rows, latents_of
from cpc.features import load_encoder, untrained_encoder
from cpc.pretrain import pretrain

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_a_new_process")]


@pytest.mark.timeout(600)
def test_a_short_run_on_the_digits_learns_what_labels_can_use(compose, tmp_path):
    """Half of the demo: far above the same encoder untrained, with the same readout and the same labels."""
    run_dir = pretrain(compose("steps=400", "probe_every=0", f"run_dir={tmp_path / 'run'}"))
    splits = mnist5k()
    encoders = {
        name: latents_of(read(run_dir, readout="grid"), splits)
        for name, read in (("CPC", load_encoder), ("random encoder", untrained_encoder))
    }
    accuracy = {row["features"]: row["accuracy"] for row in few_label_rows(encoders, splits, draws=3)}
    for readout, least in (("2x2-pooled", 0.10), ("mean-pooled", 0.15)):
        assert accuracy[f"CPC, {readout}"] > accuracy[f"random encoder, {readout}"] + least
