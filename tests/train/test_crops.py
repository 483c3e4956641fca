import io
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import card, encoded, picture, write_tar

from linic.errors import UsageError
from linic.train import data
from linic.train.recipe import Colour, Data, Noise, Pool

PLAIN = Data((Pool(1.0, 1.0),), 0.0)


def names(library):
    return sorted(os.path.basename(p.entry.name) for p in library.pictures)


def test_pictures_come_from_a_folder_and_the_folders_below_in_four_formats(tmp_path):
    for i, kind in enumerate(("png", "jpeg", "webp", "avif")):
        below = tmp_path / "in" / kind
        below.mkdir(parents=True)
        (below / f"a.{kind}").write_bytes(encoded(picture(i), kind))
    (tmp_path / "in" / "note.txt").write_text("no picture")
    library = data.Library(tmp_path / "in", tmp_path / "cache")
    assert names(library) == ["a.avif", "a.jpeg", "a.png", "a.webp"]
    for p in library.pictures:
        assert p.pixels.shape == ((40, 54, 3) if "jpeg" in p.entry.name else (96, 128, 3))      # JPEG quality 75
        assert p.pixels.dtype == torch.uint8
        if p.entry.name.endswith("png"):
            assert np.array_equal(p.pixels.numpy(), picture(0))


def test_a_tar_shard_is_read_with_its_cards_and_excluded_origins_stay_out(tmp_path):
    write_tar(tmp_path / "a.tar", {
        "1.png": encoded(picture(1)), "1.json": card("stated"), "2.json": card("non-commercial"),
        "2.png": encoded(picture(2)), "sub/3.png": encoded(picture(3)), "4.png": encoded(picture(4)), "4.json": b"{"})
    library = data.Library(tmp_path / "a.tar", tmp_path / "cache", exclude_origins=["non-commercial"])
    assert names(library) == ["3.png", "a.tar:1.png", "a.tar:4.png"] and library.excluded == 1
    assert np.array_equal(library.pictures[1].pixels.numpy(), picture(3))
    assert len(data.Library(tmp_path, tmp_path / "cache").pictures) == 4


def test_an_unreadable_file_is_a_warning_that_names_it_now_and_from_the_cache(pictures, tmp_path, capfd):
    (pictures / "broken.png").write_bytes(encoded(picture(9))[:60])
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(pictures / "deep.png")
    for _ in range(2):
        assert len(data.Library(pictures, tmp_path / "cache").pictures) == 4
        said = capfd.readouterr().err
        assert "broken.png: unreadable" in said and "deep.png: unreadable" in said and "8 bits" in said


def test_a_tar_cut_short_gives_what_came_before_the_cut(tmp_path, capfd):
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.png": encoded(picture(i)) for i in range(3)})
    path.write_bytes(path.read_bytes()[:-11000 - len(encoded(picture(2))) // 2])
    library = data.Library(path, tmp_path / "cache")
    assert 1 <= len(library.pictures) <= 2
    assert "a.tar" in capfd.readouterr().err


def test_no_pictures_is_an_error_that_says_what_was_looked_for(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match=r"in: no pictures. Looked for .avif, .jpeg, .jpg, .png, .webp .*\.tar"):
        data.Library(tmp_path / "in", tmp_path / "cache")
    with pytest.raises(UsageError, match="no such folder"):
        data.Library(tmp_path / "nowhere", tmp_path / "cache")


def test_pictures_are_decoded_once_and_again_when_a_file_changes(pictures, tmp_path, monkeypatch):
    data.Library(pictures, tmp_path / "cache")
    read = data.read_picture
    monkeypatch.setattr(data, "read_picture", None)
    assert len(data.Library(pictures, tmp_path / "cache").pictures) == 4
    monkeypatch.setattr(data, "read_picture", read)
    (pictures / "0.png").write_bytes(encoded(picture(50)))
    found = {os.path.basename(p.entry.name): p for p in data.Library(pictures, tmp_path / "cache").pictures}
    assert np.array_equal(found["0.png"].pixels.numpy(), picture(50))


def test_decoding_that_was_interrupted_leaves_no_cache_that_looks_whole(pictures, tmp_path, monkeypatch):
    def interrupted(file, clean=False):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(data, "read_picture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data.Library(pictures, tmp_path / "cache")
    assert len(data.Library(pictures, tmp_path / "cache").pictures) == 4


def test_transparent_pixels_lie_over_white_and_pictures_are_upright(tmp_path):
    Image.new("RGBA", (4, 6), (9, 9, 9, 0)).save(tmp_path / "a.png")
    assert (data.read_picture(tmp_path / "a.png") == 255).all()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (4, 6)).save(tmp_path / "b.jpg", exif=turned)
    assert data.read_picture(tmp_path / "b.jpg").shape == (4, 6, 3)


def test_a_tar_that_arrives_is_taken_in_unless_it_holds_an_evaluation_picture(pictures, tmp_path, capfd):
    library = data.Library(pictures, tmp_path / "cache")
    known = [("valid/7.png", data.dhash(picture(7)))]
    write_tar(pictures / "good.tar", {"5.png": encoded(picture(5))})
    write_tar(pictures / "bad.tar", {"6.png": encoded(picture(6)), "7.png": encoded(picture(7))})
    assert library.refresh(known) == []         # written just now: it may still be growing
    for name in ("good.tar", "bad.tar"):
        os.utime(pictures / name, (time.time() - 60,) * 2)
    assert [os.path.basename(n) for n in library.refresh(known)] == ["good.tar"]
    assert len(library.pictures) == 5 and "valid/7.png" in capfd.readouterr().err
    assert library.refresh(known) == []


def test_a_tar_can_be_decoded_in_the_background_and_a_bad_one_stays_out(pictures, tmp_path, monkeypatch, capfd):
    library, read = data.Library(pictures, tmp_path / "cache"), data.decode
    monkeypatch.setattr(data, "decode", lambda source, cache: 1 / 0 if "bad" in source.name else read(source, cache))
    for name in ("bad.tar", "good.tar"):
        write_tar(pictures / name, {"5.png": encoded(picture(5))})
        os.utime(pictures / name, (time.time() - 60,) * 2)
    taken, until = [], time.time() + 20
    while not (taken and len(library.shards) == 3) and time.time() < until:
        taken += library.refresh(background=True)
    assert [os.path.basename(t) for t in taken] == ["good.tar"] and len(library.pictures) == 5
    assert "bad.tar stays out: division by zero" in capfd.readouterr().err


def as_seen_elsewhere(pixels, size, quality):
    f = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS).save(f, "jpeg", quality=quality)
    return data.read_picture(f)


def test_a_resized_recompressed_picture_is_recognised_and_others_are_not(pictures, tmp_path):
    library = data.Library(pictures, tmp_path / "cache")
    same = as_seen_elsewhere(picture(2), (300, 220), 60)
    assert bin(data.dhash(same) ^ data.dhash(picture(2))).count("1") <= data.NEAR
    known = [("valid/x.jpg", data.dhash(same)), ("valid/y.jpg", data.dhash(picture(77)))]
    assert [(os.path.basename(a), b) for a, b in data.duplicates(library.pictures, known)] == [("2.png", "valid/x.jpg")]
    with pytest.raises(UsageError, match=r"1 evaluation pictures.*2\.png looks like valid/x\.jpg"):
        data.refuse_duplicates(pictures, library.pictures, known)
    data.refuse_duplicates(pictures, library.pictures, known[1:])


@pytest.mark.parametrize("quality, scale", [(100, 0.82), (95, 0.82), (94, 0.68), (87, 0.6), (82, 0.52), (75, 0.42),
                                            (60, 0.33), (5, 0.33)])
def test_a_jpeg_shrinks_by_its_quality_so_that_its_artefacts_vanish(tmp_path, quality, scale):
    Image.fromarray(picture(1, 100, 200)).save(tmp_path / "a.jpg", quality=quality)
    assert data.read_picture(tmp_path / "a.jpg", clean=True).shape == (round(100 * scale), round(200 * scale), 3)
    assert data.read_picture(tmp_path / "a.jpg").shape == (100, 200, 3)
    (tmp_path / "b.png").write_bytes(encoded(picture(1, 100, 200)))
    assert data.read_picture(tmp_path / "b.png", clean=True).shape == (100, 200, 3)
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "c.jpg", quality=quality)
    blocks = data.read_picture(tmp_path / "c.jpg").astype(float)
    small = data.read_picture(tmp_path / "c.jpg", clean=True).astype(float)
    at_edges, inside = (np.abs(np.diff(blocks, axis=1))[:, i::8].mean() for i in (7, 3))
    steps = np.abs(np.diff(small, axis=1)).mean((0, 2))
    if quality == 5:
        assert at_edges > 1.1 * inside and small.std() < blocks.std() and steps.max() < 3 * steps.min()


def test_report_pictures_are_known_by_their_hash(tmp_path):
    bits = np.unpackbits(np.array([data.REPORT[0]], ">u8").view(np.uint8)).reshape(8, 8).astype(int)
    rows = np.concatenate([np.zeros((8, 1), int), np.cumsum(2 * bits - 1, 1)], 1) * 12 + 128
    kodak = np.repeat(np.repeat(rows, 30, 0), 30, 1)[..., None].repeat(3, 2).astype(np.uint8)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "holiday.png").write_bytes(encoded(kodak))
    library = data.Library(tmp_path / "in", tmp_path / "cache")
    with pytest.raises(UsageError, match=r"holiday\.png looks like a report picture \(Kodak"):
        data.refuse_duplicates(tmp_path, library.pictures, data.report_hashes())


def test_validation_prefers_lossless_pictures_and_spreads_over_the_names(valid, tmp_path):
    (valid / "000.jpg").write_bytes(encoded(picture(200), "jpeg"))
    library = data.Library(valid, tmp_path / "cache")
    assert [p.entry.name[-7:] for p in data.validation_pictures(library, 2)] == ["100.png", "101.png"]
    assert len(data.validation_pictures(library, 9)) == 3


# --- crops ----------------------------------------------------------------------------------------------------------


def crops_of(folder, tmp_path, pools=PLAIN, seed=0):
    return data.Crops(data.Library(folder, tmp_path / "cache"), pools, seed)


@pytest.mark.parametrize("pools", [
    PLAIN,
    Data((Pool(1.0, 0.35), Pool(0.7, 0.35), Pool(0.5, 0.2), Pool(1.2, 0.1)), 0.2),
    Data((Pool(1.2, 1.0),), 0.5, colour=Colour(0.5, (0.8, 1.25), (0.85, 1.15))),
    Data((Pool(1.0, 1.0),), 0.0, permute=0.5, noise=Noise(0.5, (0.5, 2.5))),
], ids=["plain", "pools", "colour", "noise"])
def test_crops_have_shape_and_range_and_a_seed(pictures, tmp_path, pools):
    a, b, c = (crops_of(pictures, tmp_path, pools, seed).batch(12, 64) for seed in (1, 1, 2))
    assert a.shape == (12, 64, 64, 3) and a.dtype == torch.float32 and a.is_contiguous()
    assert a.min() >= 0 and a.max() <= 1 and a.std() > 0.05
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_plain_crop_is_a_part_of_its_picture_mirrored_half_the_time(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(picture(3, 64, 64)))
    batch = crops_of(tmp_path / "in", tmp_path).batch(40, 64)
    whole = torch.from_numpy(picture(3, 64, 64)).float() / 255
    mirrored = [torch.equal(t, whole.flip(1)) for t in batch]
    assert all(m or torch.equal(t, whole) for m, t in zip(mirrored, batch)) and 8 < sum(mirrored) < 32


def one_picture(tmp_path, pixels):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(pixels))
    return tmp_path / "in"


def test_without_flips_a_plain_crop_is_its_picture(tmp_path):
    folder = one_picture(tmp_path, picture(3, 64, 64))
    whole = torch.from_numpy(picture(3, 64, 64)).float() / 255
    batch = crops_of(folder, tmp_path, Data((Pool(1.0, 1.0),), 0.0, 0.0)).batch(9, 64)
    assert all(torch.equal(t, whole) for t in batch)


def test_channels_change_places_in_the_asked_share_and_every_order_comes(tmp_path):
    folder = one_picture(tmp_path, np.tile(np.array([10, 100, 200], np.uint8), (64, 64, 1)))
    batch = crops_of(folder, tmp_path, Data((Pool(1.0, 1.0),), 0.0, permute=0.5)).batch(3000, 16)
    assert (batch == batch[:, :1, :1]).all()
    orders = [tuple(int(v) for v in (255 * t[0, 0]).round()) for t in batch]
    assert len(set(orders)) == 6
    assert orders.count((10, 100, 200)) / 3000 == pytest.approx(1 - 0.5 * 5 / 6, abs=0.03)


def test_noise_has_its_share_strength_and_pool_and_grows_with_the_value(tmp_path):
    pixels = np.full((128, 128, 3), 64, np.uint8)
    pixels[:, :, 1] = 192
    folder = one_picture(tmp_path, pixels)
    pools = (Pool(1.0, 0.5), Pool(0.5, 0.5))
    noisy = crops_of(folder, tmp_path, Data(pools, 0.0, noise=Noise(0.5, (2.0, 2.0)))).batch(400, 64)
    deviation = 255 * noisy.std((1, 2))
    some = deviation[:, 0] > 0.1
    assert some.float().mean() == pytest.approx(0.5, abs=0.08)
    assert deviation[some].mean(0).tolist() == pytest.approx([2 * (v / 255) ** 0.5 for v in (64, 192, 64)], rel=0.05)
    assert 255 * noisy[some].mean((0, 1, 2)) == pytest.approx([64, 192, 64], abs=0.05)
    halves = crops_of(folder, tmp_path, Data(pools, 0.0, noise=Noise(1.0, (2.0, 2.0), (0.5,)))).batch(400, 64)
    assert (halves.std((1, 2))[:, 0] > 1e-3).float().mean() == pytest.approx(0.5, abs=0.08)


def test_windows_of_training_pictures_are_of_the_asked_sizes_and_stay_found(pictures, tmp_path):
    library = data.Library(pictures, tmp_path / "cache")
    windows = library.windows_like([(70, 100), (96, 128), (300, 60)], 0)
    assert windows == library.windows_like([(70, 100), (96, 128), (300, 60)], 0)
    assert len({w[0] for w in windows}) == 3
    assert [tuple(library.window(w).shape) for w in windows] == [(70, 100, 3), (96, 128, 3), (96, 60, 3)]
    assert library.window(("gone.png", 0, 0, 9, 9)) is None
    assert len(library.windows_like([(64, 64)] * 9, 0)) == 4


@pytest.mark.parametrize("size", [32, 64])
def test_crops_gathered_at_once_equal_those_cut_one_by_one(pictures, tmp_path, size):
    write_tar(pictures / "more.tar", {f"{i}.png": encoded(picture(i, 90 + i, 200)) for i in range(5)})
    pools = Data((Pool(1.0, 0.3), Pool(0.7, 0.3), Pool(0.5, 0.2), Pool(1.2, 0.2)), 0.2,
                 colour=Colour(0.5, (0.8, 1.25), (0.85, 1.15)), permute=0.3, noise=Noise(0.5, (0.5, 2.5), (1.0, 0.7)))
    library = data.Library(pictures, tmp_path / "cache")
    one_by_one, at_once = (data.Crops(library, pools, 3, batched=b) for b in (False, True))
    for _ in range(3):
        assert torch.equal(one_by_one.batch(12, size), at_once.batch(12, size))
    write_tar(pictures / "later.tar", {"9.png": encoded(picture(9))})
    os.utime(pictures / "later.tar", (time.time() - 60,) * 2)
    assert library.refresh()
    for crops in (one_by_one, at_once):
        crops.refreshed()
    assert torch.equal(one_by_one.batch(40, size), at_once.batch(40, size))


def test_saved_and_restored_crops_go_on_the_same(pictures, tmp_path):
    a, b = crops_of(pictures, tmp_path), crops_of(pictures, tmp_path, seed=4)
    a.batch(3, 64)
    b.restore(a.state())
    assert torch.equal(a.batch(5, 64), b.batch(5, 64))


def test_pictures_smaller_than_the_crop_are_skipped_with_a_count(pictures, tmp_path):
    (pictures / "tiny.png").write_bytes(encoded(picture(8, 60, 200)))
    crops = crops_of(pictures, tmp_path)
    assert len(crops.large_enough(64)) == 4
    assert data.check_crops(crops, [64, 32, 64]) == [
        "1 of 5 pictures are smaller than crops of 64 and are skipped there"]
    with pytest.raises(UsageError, match="none of 5 pictures is as large as a crop of 128 pixels"):
        data.check_crops(crops, [64, 128])


@pytest.mark.parametrize("n, m", [(128, 64), (91, 64), (112, 64)])
def test_area_means_keep_brightness_and_positions(n, m):
    r = data.area_matrix(n, m)
    ramp = torch.arange(n) + 0.5
    assert r.shape == (m, n) and torch.allclose(r.sum(1), torch.ones(m))
    assert torch.allclose(r @ ramp, (torch.arange(m) + 0.5) * n / m, atol=0.13 * n / m)
    assert torch.allclose(r.sum(0), torch.full((n,), m / n), atol=1e-6)        # every source pixel counts the same


def test_lanczos_up_scaling_keeps_a_ramp_up_to_the_edges():
    n, m = 53, 64
    r = data.lanczos_matrix(n, m)
    assert r.shape == (m, n + 2 * data.LANCZOS) and torch.allclose(r.sum(1), torch.ones(m))
    got = r @ (torch.arange(n + 2 * data.LANCZOS) + 0.5 - data.LANCZOS)
    assert torch.allclose(got, (torch.arange(m) + 0.5) * n / m, atol=0.03)
