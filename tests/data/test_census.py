"""Numbers of a data set."""

from detectron2.structures import BoxMode

from bnext.data.census import count_records


def make_record(*boxes, side=200, **more):
    annotations = [{"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": len(boxes) % 2, **more} for box in boxes]
    return {"width": side, "height": side // 2, "annotations": annotations}


def test_objects_are_counted_by_size_category_and_image():
    corners = {"bbox": [10, 10, 50, 50], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1, "keypoints": [1, 1, 2]}
    records = [
        make_record([0, 0, 31, 33], [0, 0, 32, 32], segmentation=[[0, 0, 1, 1, 2, 2]]),
        {**make_record([0, 0, 96, 96], side=300), "file_name": "a.png"},
        make_record([0, 0, 9, 9], iscrowd=1),
        {"width": 100, "height": 50, "annotations": [corners]},
    ]
    census = count_records(records)
    assert (census.num_images, census.num_empty, census.num_objects, census.num_crowds) == (4, 1, 4, 1)
    assert census.sizes == {"small": 1, "medium": 2, "large": 1}
    assert census.categories == {0: (2, 1), 1: (2, 2)}
    assert (census.num_masks, census.num_keypoints) == (2, 1)
    assert (census.smallest, census.largest) == ("100 x 50", "300 x 150")


def test_records_without_labels_are_images():
    census = count_records([{"file_name": "a.png"}])
    assert (census.num_images, census.num_empty, census.num_objects, census.smallest) == (1, 1, 0, "")
