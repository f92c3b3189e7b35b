"""The corpus of bad input, and the page of docs/ that is made of it.

python tests/bad_input_cases.py     writes docs/errors.md
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bad_input_plants import (
    ICDAR,
    Evil,
    balance,
    category,
    classes,
    cut,
    cut_checkpoint,
    distances,
    edit,
    entry,
    evaluate_unknown,
    exported,
    flip_checkpoint,
    folder,
    folders,
    icdar,
    image,
    lines,
    load_checkpoint,
    load_words,
    mix,
    no_vocabulary,
    non_utf8,
    nothing,
    raw,
    read_folders,
    restore_weights,
    saved,
    skip_in_evaluation,
    skip_missing,
    specify,
    train_on_nothing,
    turned,
    twice,
    type_,
    vocabulary,
    words,
)
from PIL import Image
from safetensors.torch import save_file
from toy import Toy
from whole_load import load_everything

from mtl_rcnn.config import compose
from mtl_rcnn.engine.cluster import find_place
from mtl_rcnn.errors import CheckpointError, ConfigError, DataError, MtlRcnnError, UnreadableImageError
from mtl_rcnn.predict.label_files import LabelFiles

ERRORS = Path(__file__).resolve().parents[1] / "docs" / "errors.md"


@dataclass(frozen=True)
class Case:
    """A fault and what the user is told.

    Attributes:
        area: heading in docs/errors.md.
        fault: in words.
        said: part of the message, literally.
        spoil: plants the fault in a toy data set.
        run: what a user does then.
        error: class of the error; None where the fault is left out and counted.
    """

    area: str
    fault: str
    said: str
    spoil: Callable[[Toy], Any]
    run: Callable[[Toy], Any] = load_everything
    error: type[MtlRcnnError] | None = DataError


NO_IMAGE, JSON, MASKS, POINTS = "Images", "Annotation files", "Masks", "Keypoints"
WORDS = "Labels of images"
CONFIG, CHECKPOINT, MIXTURE, PSEUDO = "Configurations", "Checkpoints", "Several training sets", "Pseudo-labels"
MAPS, ATTRIBUTES = "Maps of classes and of depth", "Attributes"
_unreadable = partial(Case, NO_IMAGE, error=UnreadableImageError)
_config = partial(Case, CONFIG, spoil=nothing, error=ConfigError)
_attributes = partial(Case, ATTRIBUTES)
_checkpoint = partial(Case, CHECKPOINT, run=load_checkpoint, error=CheckpointError)
_weights = partial(Case, CHECKPOINT, run=restore_weights, error=CheckpointError)
_pseudo = partial(Case, PSEUDO, spoil=nothing, error=ConfigError)
_mixture = partial(Case, MIXTURE, spoil=nothing, error=ConfigError)

LINES = "Lines of text"

CASES = [
    # Images
    Case(NO_IMAGE, "an image file is missing", "1 of 6 image files are missing, the first is",
         image(Path.unlink)),
    Case(NO_IMAGE, "an image file is missing, data.on_error=skip", "removed 1: image file missing (1)",
         image(Path.unlink), skip_missing, None),
    Case(NO_IMAGE, "the folder of images is missing", "no image folder", nothing, specify(images="elsewhere")),
    Case(NO_IMAGE, "a file name that is not UTF-8 on the disk", "1 of 6 image files are missing", non_utf8),
    _unreadable("a truncated image", "the image cannot be decoded (", image(cut)),
    _unreadable("an image of zero bytes", "cannot be decoded (the file is empty)", image(lambda p: p.write_bytes(b""))),
    _unreadable("a web page saved as an image", "cannot be decoded (its format is unknown)",
                image(lambda p: p.write_text("<html>"))),
    _unreadable("a folder in place of an image", "cannot be decoded (it is a folder)", image(folder)),
    _unreadable("an image of another size", "its annotation file says 48 x 64",
                image(lambda p: Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(p))),
    _unreadable("an image that its EXIF data turns", "turned as its EXIF orientation says", image(turned)),
    Case(NO_IMAGE, "a damaged image, data.on_error=skip", "12.png (dataset 'toy', image id 12): the image cannot be",
         image(cut), skip_in_evaluation, None),
    Case(NO_IMAGE, "ten damaged images in a row, data.on_error=skip", "10 images in a row cannot be read",
         lambda toy: [p.write_bytes(b"") for p in toy.images.iterdir()], train_on_nothing),
    # Annotation files
    Case(JSON, "the file is missing", "no such annotation file", lambda toy: toy.boxes.unlink()),
    Case(JSON, "a folder in place of the file", "cannot be read", lambda toy: folder(toy.boxes)),
    Case(JSON, "a file of zero bytes", "line 1, column 1: not JSON", raw(b"")),
    Case(JSON, "a truncated file", "the file may be truncated", raw(b'{"images": [{"id": 1}')),
    Case(JSON, "bytes that are not UTF-8", "is not UTF-8 text", raw(b'{"images": "\xff"}')),
    Case(JSON, "lists inside lists, a hundred thousand deep", "not a JSON that can be read", raw(b"[" * 100_000)),
    Case(JSON, "a list at the top level", "a list at the top level", raw(b"[]")),
    Case(JSON, "no list of annotations", "no list 'annotations' at the top level",
         edit(lambda c: c.pop("annotations"))),
    Case(JSON, "an image id twice", "image id 11 occurs twice", edit(lambda c: c["images"][1].update(id=11))),
    Case(JSON, "an annotation id twice", "annotation id 101 occurs twice", entry(102, id=101)),
    Case(JSON, "an image without height", "image 11 has no 'height'", edit(lambda c: c["images"][0].pop("height"))),
    Case(JSON, "an image 0 pixels wide", "image 11: width is 0", edit(lambda c: c["images"][0].update(width=0))),
    Case(JSON, "a file name that is a number", "image 11: file_name is 7",
         edit(lambda c: c["images"][0].update(file_name=7))),
    Case(JSON, "an annotation of an unknown image", "image_id 99 is not among the file's 6 images",
         entry(101, image_id=99)),
    Case(JSON, "an annotation of an unknown category", "unknown category_id 4", entry(101, category_id=4)),
    Case(JSON, "an annotation without id", "annotation number 0 has no 'id'",
         edit(lambda c: c["annotations"][0].pop("id"))),
    Case(JSON, "a category id that is a text", "category id '2' is not an integer", category("boxes", id="2")),
    Case(JSON, "a category name that is a number", "name is 5; expected a text", category("boxes", name=5)),
    Case(JSON, "a box with NaN", "expected 4 finite numbers", entry(101, bbox=[1.0, float("nan"), 3.0, 4.0])),
    Case(JSON, "a box with an integer of 400 digits", "expected 4 finite numbers", entry(101, bbox=[10**400, 1, 3, 4])),
    Case(JSON, "a box of three numbers", "expected 4 finite numbers", entry(101, bbox=[1, 2, 3])),
    Case(JSON, "a box of two corners", "has a negative size", entry(101, bbox=[30, 20, -10, -5])),
    Case(JSON, "an object without a box", "annotation 109 has no 'bbox'",
         edit(lambda c: c["annotations"][8].pop("bbox"))),
    Case(JSON, "iscrowd of 2", "iscrowd is 2; expected 0 or 1", entry(101, iscrowd=2)),
    Case(JSON, "an area that is a text", "area is 'large'", entry(101, area="large")),
    Case(JSON, "two files that contradict each other", "but an earlier file", entry(101, "points", bbox=[0, 0, 5, 5])),
    Case(JSON, "classes that the network does not know", "classes that the network does not know", nothing,
         evaluate_unknown),
    # Masks
    Case(MASKS, "a polygon of two points", "has a polygon of 4 numbers", entry(102, segmentation=[[1, 2, 3, 4]])),
    Case(MASKS, "a polygon of an odd number of numbers", "has a polygon of 7 numbers",
         entry(102, segmentation=[[1, 2, 3, 4, 5, 6, 7]])),
    Case(MASKS, "a polygon with an infinite coordinate", "a coordinate that is not finite",
         entry(102, segmentation=[[1, 2, 3, 4, 5, float("inf")]])),
    Case(MASKS, "a polygon a million pixels away", "a polygon that reaches from",
         entry(102, segmentation=[[1, 2, 1e6, 4, 5, 6]])),
    Case(MASKS, "run lengths of another image size", "has a run-length mask of size [7, 7]",
         entry(105, segmentation={"size": [7, 7], "counts": [49]})),
    Case(MASKS, "run lengths that end before the image does", "run lengths of 100 pixels",
         entry(105, segmentation={"size": [40, 80], "counts": [40, 60]})),
    Case(MASKS, "compressed run lengths that are damaged", "has no run lengths in its mask",
         entry(105, segmentation={"size": [40, 80], "counts": "ab\x7f"})),
    Case(MASKS, "a mask that is declared and missing", "annotation 104 has no 'segmentation'", nothing,
         specify(tasks=["detection", "mask"])),
    # Keypoints
    Case(POINTS, "an array of another length", "has 3 keypoint numbers", entry(101, "points", keypoints=[18, 8, 2])),
    Case(POINTS, "an array with a text", "expected 9 finite numbers",
         entry(101, "points", keypoints=["x", 8, 2, 10, 20, 2, 26, 20, 1])),
    Case(POINTS, "an array with NaN", "expected 9 finite numbers",
         entry(101, "points", keypoints=[float("nan"), 8, 2, 10, 20, 2, 26, 20, 1])),
    Case(POINTS, "keypoints that are declared and missing", "has no 'keypoints', but the dataset declares",
         lambda toy: [edit(lambda c: c["annotations"][0].pop("keypoints"), "points")(toy)],
         specify(tasks=["detection", "keypoint"])),
    Case(POINTS, "keypoint names that are a text", "expected a list of names", category(keypoints="head")),
    Case(POINTS, "a skeleton of single numbers", "expected pairs of keypoint numbers", category(skeleton=[1, 2])),
    Case(POINTS, "a skeleton that leaves the keypoints", "its skeleton names a keypoint outside 1..3",
         category(skeleton=[[1, 9]]), error=ConfigError),
    Case(POINTS, "no class declares keypoints", "no class declares keypoints", nothing,
         specify(annotations="boxes.json"), ConfigError),
    # Configurations
    _config("a key that does not exist", "no key 'solver.max_itr'; did you mean 'solver.max_iter'?",
            run=type_("solver.max_itr=5")),
    _config("a choice that does not exist", "resnet50_fpn", run=type_("model=resnet50")),
    _config("settings of a task that is not selected", "the task 'mask' is not selected",
            run=type_("tasks=[detection]", "+tasks.mask.norm=BN")),
    _config("a cluster that there is not", "no cluster 'slrum'; did you mean 'slurm'", run=type_("cluster=slrum")),
    _config("a job of no node", "cluster.nodes=0: expected a whole number of at least 1",
            run=type_("cluster=slurm", "cluster.nodes=0")),
    _config("a container without an image", "cluster.container_image has no value: add cluster.container_image=VALUE",
            run=type_("cluster=slurm_pyxis")),
    _config("several tasks of srun without cluster=slurm", "srun started 2 tasks (SLURM_STEP_NUM_TASKS=2), each of",
            run=lambda toy: find_place("local", {"SLURM_STEP_NUM_TASKS": "2"})),
    _config("no task", "no task is selected", run=type_("tasks=[]")),
    _config("a value that was left open", "network has no value", run=lambda toy: compose("predict", ["input=x"])),
    _config("a number out of range", "solver.lr=-1: expected a number above 0", run=type_("solver.lr=-1")),
    _config("a word for a number", "solver.max_iter=many: expected a whole number", run=type_("solver.max_iter=many")),
    _config("weights alone to resume from", "this one holds weights alone, which start a run as checkpoint.weights",
            run=type_("checkpoint.resume=model.safetensors")),
    _config("a method of export that does not exist", "export.method=tflite: expected trace or script or onnx or",
            run=lambda toy: compose("export", ["run=x", "export.method=tflite"])),
    _config("a frozen part that does not exist", "solver.freeze: the network has no part 'trnk'; did you mean 'trunk'?",
            run=type_("solver.freeze=[trnk]")),
    _config("a factor of the learning rate whose name's dots were taken apart", "a name with dots stands in braces",
            run=type_("+solver.lr_factors.backbone.fpn_output2=0.5")),
    _config("kept features of a trunk that learns", "model.cache_features=ram: features are kept of a trunk that does "
            "not change; add solver.freeze=[trunk]", run=type_("model.cache_features=ram")),
    _config("kept features of images that are flipped and resized at random", "add "
            "data.train_augment.resize.short_edge_length=800 data.train_augment.flip=null",
            run=type_("model.cache_features=ram", "solver.freeze=[trunk]")),
    _config("a schedule of a task that does not exist", "solver.task_schedule: no task 'detektion'; did you mean",
            run=type_("+solver.task_schedule.detektion.start=5")),
    _config("a schedule with a key that does not exist", "solver.task_schedule.detection: no key 'end'; there are",
            run=type_("+solver.task_schedule.detection.end=5")),
    _config("a task that stops before it starts", "detection.stop=5: iteration 5 is not after the start, 9",
            run=type_("+solver.task_schedule.detection={start: 9, stop: 5}")),
    _config("a schedule that leaves an iteration without a task", "solver.task_schedule: no task trains in iteration 0",
            run=type_("tasks=[detection]", "+solver.task_schedule.detection.start=5")),
    _config("a task's weight below 0", "weights=[[0, 1], [9, -1]]: the weight -1 is no number of at least 0",
            run=type_("+solver.task_schedule.detection.weights=[[0,1],[9,-1]]")),
    _config("an analysis every few epochs", "analysis.every=2ep: expected a whole number of at least 0",
            run=type_("analysis.every=2ep")),
    _config("a plan for no node", "nodes=[0]: expected a list of whole numbers of at least 1, such as [1,2,4]",
            run=lambda toy: compose("plan", ["nodes=[0]"])),
    _config("an analysis of no batch", "batches=0: expected a whole number of at least 1",
            run=lambda toy: compose("analyze_tasks", ["run=x", "batches=0"])),
    _config("a folder of configurations that is not there", "nowhere",
            run=type_("hydra.searchpath=[file:///nowhere]")),
    _config("a YAML that names os.system", "the package 'os' is not trusted here",
            run=type_("tasks.detection._target_=os.system")),
    _config("a class of a package that nobody trusts", "--trust stranger",
            run=type_("tasks.detection._target_=stranger.tasks.Task")),
    _config("a balancing method that does not exist", "no balancing 'pcgard'; did you mean 'pcgrad'?",
            run=type_("balancing=pcgard")),
    _config("gradients compared where there are none", "balancing.at=heads: expected features or parameters",
            run=type_("balancing=upgrad", "balancing.at=heads")),
    _config("a knob of another balancing method", "no key 'balancing.at'",
            run=type_("balancing=uncertainty", "balancing.at=parameters")),
    _config("a method on gradients with a single task", "PCGrad weighs tasks against each other, and the network has",
            run=balance("balancing=pcgrad", tasks=("detection",))),
    _config("a weight of a loss that does not exist", "balancing.weights: no loss 'dept'; did you mean 'depth'?",
            run=balance("+balancing.weights.dept=0.5")),
    _config("an unknown key of a data set", "imagess: unknown key (did you mean 'images'?)",
            run=specify(imagess="x")),
    _config("a class that the data set does not have", "'discs', which is no category", run=specify(classes=["discs"])),
    _config("an image id that the data set does not have", "image_ids names 99", run=specify(image_ids=[99])),
    _config("two data sets of one name", "two datasets are named 'toy'", run=twice),
    # Checkpoints
    _checkpoint("the file is missing", "no such checkpoint", nothing),
    _checkpoint("a truncated file", "not a readable checkpoint", cut_checkpoint),
    _checkpoint("a file of zero bytes", "not a readable checkpoint",
                lambda toy: (toy.root / "model.pth").write_bytes(b"")),
    _checkpoint("a flipped bit in a tensor", "the checksum of", flip_checkpoint),
    _checkpoint("a pickle that runs a command when opened", "not a readable checkpoint",
                lambda toy: saved(toy, model=Evil(toy.root / "was_run"))),
    _checkpoint("a file of somebody else's", "model.pth",
                lambda toy: torch.save({"w": torch.ones(2)}, toy.root / "model.pth")),
    _weights("weights alone, truncated", "not a readable safetensors file, truncated", exported(lambda b: b[:-9])),
    _weights("weights alone, a flipped bit in a tensor", "damaged (its checksum is wrong)",
             exported(lambda b: b[:-1] + b"!")),
    _weights("weights alone, of a later format", "has format 9, this version of mtl_rcnn reads 1",
             exported(lambda b: b.replace(rb'format\": 1', rb'format\": 9'))),
    _weights("somebody else's safetensors file for a network", "its metadata has no 'mtl_rcnn'",
             lambda toy: save_file({"w": torch.ones(2)}, toy.root / "model.safetensors")),
    # Mixtures
    _mixture("a method that does not exist", "data.mixing.method=equal: expected null, proportional,",
             run=mix("data.mixing.method=equal")),
    _mixture("a ratio of an unknown training set", "no training set 'two_'; did you mean 'two'?",
             run=mix("data.mixing.method=ratios", "+data.mixing.ratios.one=1", "+data.mixing.ratios.two_=1")),
    _mixture("a training set without a ratio", "no number for the training set 'two'",
             run=mix("data.mixing.method=ratios", "+data.mixing.ratios.one=1")),
    _mixture("a negative ratio", "data.mixing.ratios.two=-1: expected a number of at least 0",
             run=mix("data.mixing.method=ratios", "+data.mixing.ratios.one=1", "+data.mixing.ratios.two=-1")),
    _mixture("a ratio that is a text", "data.mixing.ratios.two=many: expected a number of at least 0",
             run=mix("data.mixing.method=ratios", "+data.mixing.ratios.one=1", "+data.mixing.ratios.two=many")),
    _mixture("ratios that are all 0", "all are 0",
             run=mix("data.mixing.method=ratios", "+data.mixing.ratios.one=0", "+data.mixing.ratios.two=0")),
    _mixture("ratios with another method", "count with data.mixing.method=ratios alone, and the method is sqrt",
             run=mix("data.mixing.method=sqrt", "+data.mixing.ratios.one=1")),
    _mixture("a temperature of 0", "data.mixing.temperature=0: expected a number above 0",
             run=mix("data.mixing.method=temperature", "data.mixing.temperature=0")),
    _mixture("no temperature", "data.mixing.temperature=null: expected a number above 0",
             run=mix("data.mixing.method=temperature")),
    _mixture("a temperature with another method", "and the method is null", run=mix("data.mixing.temperature=2")),
    _mixture("a repeated training set whose share is given", "data.train[0].repeat=3: with data.mixing.method=uniform",
             run=mix("data.mixing.method=uniform", repeat=3)),
    _pseudo("a threshold of 2", "threshold=2: expected a number from 0 to 1",
            run=lambda toy: compose("pseudo_label", ["network=x", "output_dir=x", "dataset={name: x}", "threshold=2"])),
    _pseudo("an output directory that holds something", "exists already; choose another, or move it away",
            run=lambda toy: LabelFiles(toy.images, toy.images)),
    _mixture("a training set that labels no selected task", "dataset 'toy' trains nothing: it labels no image for any",
             run=specify(tasks=[])),
    # Labels of images
    Case(WORDS, "a label that the vocabulary lacks", "image 11 (", words(["rde", "day"]), load_words),
    Case(WORDS, "a label that the vocabulary lacks, with what is near", "did you mean 'red'?",
         words(["rde", "day"]), load_words),
    Case(WORDS, "labels that are a text", "is 'red'; expected a list of names", words("red"), load_words),
    Case(WORDS, "no vocabulary", "needs the vocabulary 'image_labels', which no training set has",
         lambda toy: [edit(lambda c: c.pop("vocabularies"), file)(toy) for file in ("boxes", "points")], load_words,
         ConfigError),
    Case(WORDS, "a part that the vocabulary lacks", "has no such part (did you mean 'colour'?); parts are colour, time",
         nothing, lambda toy: load_words(toy, "tasks.image_label.part=color"), ConfigError),
    Case(WORDS, "a folder with another number of parts",
         "dark_red_dress: the folder's name has 3 parts, expected 2 (colour_garment)",
         folders("dark_red_dress", "red_shirt/"), read_folders),
    Case(WORDS, "a folder without an image", "red_shirt: the folder holds no image",
         folders("red_dress", "red_shirt/"), read_folders),
    Case(WORDS, "a word in two parts", "'dress' is a colour and a garment",
         lambda toy: [folders("red_dress")(toy), folders("dress_red/")(toy)], read_folders),
    Case(WORDS, "a combination to leave out that is not there", "leave_out names 'red_skirt', which is no folder",
         folders("red_dress"), partial(read_folders, leave_out="red_skirt"), ConfigError),
    # Maps of classes and of depth
    Case(MAPS, "a class id that the vocabulary lacks", "3072 pixels have the class id 2: expected ids of", classes(2)),
    Case(MAPS, "a map of another size than its image", "classes/12.png is 9 x 7 pixels", classes(0, (7, 9))),
    Case(MAPS, "a map in colours", "classes/12.png has 3 values per pixel (R, G, B): expected one",
         classes(0, (64, 48, 3))),
    Case(MAPS, "a map whose file is missing", "there is no label file", classes(Path.unlink)),
    Case(MAPS, "a truncated map", "the label file cannot be read", classes(cut)),
    Case(MAPS, "a web page saved as a map", "the label file cannot be read", classes(lambda p: p.write_text("<html>"))),
    Case(MAPS, "a map that is declared and not named", "image 14 has no 'sem_seg_file_name', but the dataset declares",
         nothing, specify(tasks=["semantic"])),
    Case(MAPS, "a map of classes without a vocabulary", "the task 'semantic' needs the vocabulary 'sem_seg_classes'",
         no_vocabulary, error=ConfigError),
    Case(MAPS, "distances of another size than their image", "distances/12.png is 9 x 7 pixels", distances(5, (7, 9))),
    Case(MAPS, "negative distances", "3072 pixels are negative or not finite, such as -5", distances(-5)),
    Case(MAPS, "distances that are not finite", "3072 pixels are negative or not finite, such as nan",
         distances(float("nan"))),
    Case(MAPS, "a map that knows no distance", "no pixel is within 0.001 to 80 m (values go from 0 to 0", distances(0)),
    Case(MAPS, "distances without a scale", "image 12: depth_scale is None: expected the values per metre",
         edit(lambda c: c["images"][1].update(depth_scale=None))),
    Case(MAPS, "distances of another scale", "no pixel is within 0.001 to 80 m (values go from 0 to 6000",
         edit(lambda c: c["images"][1].update(depth_scale=0.001))),
    Case(MAPS, "distances that are declared and not named", "image 14 has no 'depth_file_name', but the dataset",
         nothing, specify(tasks=["depth"])),
    # Attributes
    _attributes("a group that the vocabulary lacks", "lacks (did you mean 'colour'?)",
                entry(101, attributes={"color": "red"})),
    _attributes("a value that the group lacks", "annotation 101 has the attribute colour='purple', which is not one of",
                entry(101, attributes={"colour": "purple"})),
    _attributes("a list for one of several values", "expected one name of red, green, blue",
                entry(101, attributes={"colour": ["red"]})),
    _attributes("a name for any of several values", "expected a list of names of rim, dots, stripes",
                entry(101, attributes={"marks": "rim"})),
    _attributes("a text for a number", "weight='3.5': expected a finite number",
                entry(101, attributes={"weight": "3.5"})),
    _attributes("NaN for a number", "weight=nan: expected a finite number",
                entry(101, attributes={"weight": float("nan")})),
    _attributes("a group of other classes", "but is a 'disc': the attribute belongs to figure, square",
                entry(102, attributes={"weight": 3.5})),
    _attributes("a list of attributes", "expected an object, group -> value", entry(101, attributes=["red"])),
    _attributes("attributes that are declared and missing", "has no 'attributes', but the dataset declares", nothing,
                specify(tasks=["detection", "attribute"])),
    _attributes("a group of a type that does not exist", "'colour' has the type 'category'; expected categorical",
                vocabulary(0, type="category")),
    _attributes("a group without values", "'colour' is categorical and has the values []", vocabulary(0, values=[])),
    _attributes("files whose groups have other values", "contradict each other",
                edit(lambda c: c["vocabularies"]["attributes"][0].update(values=["red"]))),
    # Lines of text
    Case(LINES, "a polygon of three corners", "line 1 of 'text_lines': its polygon is [6, 30, 50, 28, 50, 42]",
         lines(1, polygon=[6, 30, 50, 28, 50, 42])),
    Case(LINES, "a polygon with NaN", "has a coordinate that is not finite",
         lines(0, polygon=[float("nan"), 4, 60, 4, 60, 16, 4, 16])),
    Case(LINES, "a polygon outside the image", "lies outside the image of 64 x 48 pixels",
         lines(0, polygon=[104, 4, 160, 4, 160, 16, 104, 16])),
    Case(LINES, "a line that is a text", "line 0 of 'text_lines': is 'upper'; expected an object",
         edit(lambda c: c["images"][0].update(text_lines=["upper"]))),
    Case(LINES, "lines that are no list", "'text_lines' is 'upper'; expected a list",
         edit(lambda c: c["images"][0].update(text_lines="upper"))),
    Case(LINES, "lines that are declared and missing", "image 13 has no 'text_lines', but the dataset declares",
         nothing, specify(tasks=["text"])),
    Case(LINES, "an ICDAR line of seven coordinates", "gt_12.txt, line 2: '4,5,20,5,20,9,4,word'; expected x1,",
         icdar("4,5,20,5,20,9,4,word"), specify(**ICDAR)),
    Case(LINES, "an ICDAR line without a transcription", "gt_12.txt, line 2: '4,5,20,5,20,9,4,9'; expected x1,",
         icdar("4,5,20,5,20,9,4,9"), specify(**ICDAR)),
    Case(LINES, "an ICDAR file that is not UTF-8", "gt_12.txt: is not UTF-8",
         icdar(b"4,5,20,5,20,9,4,9,caf\xe9"), specify(**ICDAR)),
]  # fmt: skip


def page() -> str:
    """docs/errors.md."""
    lines = [
        "# Errors",
        "",
        "What bad input gives: one error, whose text names the file, the image id, the annotation id or the "
        "configuration key, says what was",
        "expected and how to go on; tools print it in one line and end with status 2. Written by "
        "`python tests/bad_input_cases.py` from the tests'",
        "own table: every line is tested. All faults of a data set at once, with repairs: "
        "`python tools/check_data.py`.",
    ]
    for area in dict.fromkeys(case.area for case in CASES):
        lines += ["", f"## {area}", "", "| fault | what happens | the message holds |", "|---|---|---|"]
        for case in (case for case in CASES if case.area == area):
            outcome = f"`{case.error.__name__}`" if case.error else "left out, named and counted"
            lines.append(f"| {case.fault} | {outcome} | `{case.said}` |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    ERRORS.write_text(page(), encoding="utf-8")
    print(f"wrote {ERRORS}: {len(CASES)} faults")
