"""`fastdcgan features`"""

from __future__ import annotations

import argparse

from fastdcgan.checks import Range, printable
from fastdcgan.cli.options import add_checkpoint, add_data, add_number, add_out, add_seed, folder_to_fill
from fastdcgan.dcgan import augmentation, distributed, feature_report, trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    add_data(parser, "a folder (for all but --export with a folder for each class), or a built-in set")
    parser.add_argument("--export", action="store_true", help="write features.npz; done if nothing else is asked for")
    parser.add_argument("--fit", action="store_true", help="fit a linear SVM on the training part: classifier.npz")
    parser.add_argument(
        "--eval", action="store_true", help="compare with a random network, raw pixels and k-means: accuracy.md, .json"
    )
    parser.add_argument(
        "--augment", action="store_true", help="does a classifier with few labels gain by generated images? "
        "augmentation.md, .json"
    )  # fmt: skip
    parser.add_argument(
        "--layers", help="names with commas, of the discriminator; or of the generator as generator.NAME, or z, by "
        "searching for each image's z [default: all of the discriminator's but the logit]"
    )  # fmt: skip
    add_number(parser, "--pool", Range(0), default=4, help="max-pool maps to this side, 0 for not at all")
    add_number(parser, "--search-steps", Range(1), default=200, help="of the search for an image's z")
    add_number(parser, "--labels", Range(1), nargs="+", default=[10, 100, 1000], help="numbers of labels to compare at")
    add_number(parser, "--per-class", Range(1), default=10, help="labels of each class for --augment")
    add_number(parser, "--draws", Range(1), default=5, help="sets of labels to draw for each number")
    add_seed(parser, "of the draws, the random network and k-means")
    add_out(parser, "features", "folder for the results")


def run(args: argparse.Namespace) -> int:
    device = distributed.choose_device(args.device)
    nets = trained.load_trained(args.checkpoint, device)
    data = nets.images(args.data)
    layers, pool = args.layers.split(",") if args.layers else None, args.pool or None
    extractor = feature_report.extractor_of(nets, layers, pool, args.search_steps)
    settings = augmentation.Settings(args.per_class, args.draws, seed=args.seed)
    if args.fit or args.eval or args.augment:
        split = feature_report.load_split(data, nets)
    folder_to_fill(args.out)
    if args.export or not (args.fit or args.eval or args.augment):
        feature_report.export(extractor, data, nets.config, device, args.out / "features.npz")
    if args.fit:
        svm, accuracy = feature_report.fit(extractor, split, device, args.out / "classifier.npz", args.seed)
        print(f"{100 * accuracy:.1f}% of {split.test.sum()} test images right, with C = {svm.c:g}")
    if args.eval:
        scores = feature_report.compare(
            extractor,
            nets,
            split,
            device,
            layers=layers,
            pool=pool,
            counts=args.labels,
            draws=args.draws,
            seed=args.seed,
        )
        print(feature_report.write_comparison(scores, nets, data, split, args.out))
    if args.augment:
        accuracies = augmentation.experiment(nets, split, settings, device)
        print(augmentation.write(accuracies, split, settings, nets, args.out))
    print(printable(args.out))
    return 0
