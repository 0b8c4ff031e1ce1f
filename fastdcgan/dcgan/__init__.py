"""DCGAN: the networks, training on real images, checkpoints and samples, on top of the fused layers."""

from fastdcgan.dcgan.checkpoint import CheckpointError
from fastdcgan.dcgan.classify import LinearSVM
from fastdcgan.dcgan.config import TrainConfig
from fastdcgan.dcgan.convert import convert_projection, example_state_dict, load_example_state_dict
from fastdcgan.dcgan.data import Batches, Images, Labelled, load_images, load_labelled
from fastdcgan.dcgan.features import FeatureExtractor
from fastdcgan.dcgan.metrics import Diverged
from fastdcgan.dcgan.models import IMAGE_SIZES, Discriminator, Generator
from fastdcgan.dcgan.projection import encode
from fastdcgan.dcgan.sampling import sample
from fastdcgan.dcgan.trained import Trained, load_generator, load_trained
from fastdcgan.dcgan.training import Outcome, Trainer
from fastdcgan.train_step import GradientPenalty, StepMetrics, train_step

__all__ = [
    "IMAGE_SIZES",
    "Batches",
    "CheckpointError",
    "Discriminator",
    "Diverged",
    "FeatureExtractor",
    "Generator",
    "GradientPenalty",
    "Images",
    "Labelled",
    "LinearSVM",
    "Outcome",
    "StepMetrics",
    "TrainConfig",
    "Trained",
    "Trainer",
    "convert_projection",
    "encode",
    "example_state_dict",
    "load_example_state_dict",
    "load_generator",
    "load_images",
    "load_labelled",
    "load_trained",
    "sample",
    "train_step",
]
