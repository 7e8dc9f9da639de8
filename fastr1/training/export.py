"""The trained model as a folder that can be loaded, evaluated and shared."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from fastr1.config import TrainConfig
from fastr1.evaluation.recorded import record_settings
from fastr1.models import Processor, VideoLanguageModel, save_model
from fastr1.training.agreement import agreement
from fastr1.training.distributed import DistributedModel

logger = logging.getLogger(__name__)


def export_model(
    distributed: DistributedModel, model: VideoLanguageModel, processor: Processor, config: TrainConfig, path: Path
) -> None:
    """Write the trained model in the layout it was read in, in the training dtype, with how videos and questions were
    shown to it (`fastr1.evaluation.recorded`). All ranks call it.

    The folder gets its name once it is whole.
    """
    state, partial = distributed.consolidated_state_dict(), path.with_name(f"{path.name}.partial")
    with agreement(distributed):
        if state is not None:
            shutil.rmtree(partial, ignore_errors=True)
            record_settings(partial, config)
            save_model(partial, model, processor, state_dict=state)
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
            logger.info("model written to %s", path)
