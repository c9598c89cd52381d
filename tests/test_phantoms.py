"""Made-up hospitals: the physics of an X-ray, bodies in HU, and files that the ordinary readers read back."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest

from client.anatomy import AIR_HU, Ellipsoid, Grid, Tube, draw_body, render
from client.phantoms import WATER_PER_MM, PhantomConfig, ct, project, radiograph, write_hospital
from client.reading import read_scans
from client.site_config import DataSource
from unimiss_core.scan import Scan

GRID = Grid((20, 40, 48), (13.0, 8.0, 7.0))
SMALL = {"volume_shape": (14, 36, 44), "volume_spacing_mm": (18.0, 9.0, 8.0)}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def hospital(kind: str, folder: Path, *, patients: int = 3, seed: int = 5) -> list[tuple[str, Scan]]:
    """A hospital written, and every scan read back from it: (first file, scan)."""
    write_hospital(PhantomConfig.model_validate({"kind": kind, "patients": patients, "seed": seed, **SMALL}), folder)
    return [(origin.files[0], scan) for origin, scan in read_scans([DataSource(folder=folder / "scans")])]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------ physics


def test_a_slab_lets_through_what_beer_and_lambert_say() -> None:
    slab = np.full((5, 30, 7), AIR_HU, dtype=np.float32)
    slab[:, 4:14] = 0.0  # 10 steps of 3 mm of water
    slab[:, 20:22] = 1000.0  # 2 steps of something twice as dense
    expected = np.exp(-WATER_PER_MM * (10 * 3.0 + 2 * 2 * 3.0))
    np.testing.assert_allclose(project(slab, 3.0), np.full((5, 7), expected), rtol=1e-5)


def test_air_lets_everything_through_and_numbers_below_air_do_not_amplify() -> None:
    assert (project(np.full((2, 3, 4), -1024.0, dtype=np.float32), 5.0) == 1).all()


def test_an_x_ray_shows_the_volume_s_anatomy_upright() -> None:
    body = draw_body(rng(1), lesion=False)
    picture = radiograph(body, rng(2)).astype(float)
    shadow = -np.log(project(render(body, Grid((128, 30, 160), (2.0, 8.0, 2.1))), 8.0))
    upright = np.corrcoef(picture.ravel(), shadow[::-1].ravel())[0, 1]
    others = (shadow, shadow[:, ::-1], shadow[::-1, ::-1])
    assert upright > 0.9
    assert upright > max(np.corrcoef(picture.ravel(), other.ravel())[0, 1] for other in others)


def test_an_x_ray_uses_its_twelve_bits_and_none_beyond() -> None:
    picture = radiograph(draw_body(rng(3), lesion=True), rng(4))
    assert picture.dtype == np.uint16
    assert picture.max() <= 4095
    assert np.ptp(picture) > 3000


# ------------------------------------------------------------------------------------------------------------ anatomy


def test_a_body_has_the_tissues_of_a_chest_in_plausible_amounts() -> None:
    volume = render(draw_body(rng(6), lesion=False), GRID)
    litres = np.prod(GRID.spacing_mm) / 1e6
    body = volume > -950
    assert volume.min() >= -1010
    assert volume.max() < 900
    lungs = ((volume > -950) & (volume < -700)).sum() * litres
    assert 2 < lungs < 7.5
    assert 8 < body.sum() * litres < 25
    assert 0.2 < (volume > 200).sum() * litres < 3  # bone
    assert ((volume > -130) & (volume < -70)).sum() * litres > 1  # fat
    assert (volume[:, 0] < -900).all()  # in front of the body there is air


def test_a_lesion_is_more_tissue_within_a_lung() -> None:
    for seed in range(6):
        body = draw_body(rng(seed), lesion=True)
        healthy = type(body)(**{**vars(body), "lesions": ()})
        grid = Grid((40, 60, 70), (6.5, 5.0, 5.0))
        difference = render(body, grid) - render(healthy, grid)
        changed = np.abs(difference) > 1
        assert body.finding in ("nodule", "opacity")
        assert difference[changed].mean() > 100
        assert (render(healthy, grid)[changed] < -400).mean() > 0.6
    assert draw_body(rng(0), lesion=False).finding == "none"
    assert draw_body(rng(0), lesion=False).lesions == ()


def test_no_two_patients_are_alike() -> None:
    volumes = [render(draw_body(rng(seed), lesion=False), GRID) for seed in range(6)]
    for i, a in enumerate(volumes):
        assert all(np.abs(a - b).mean() > 10 for b in volumes[i + 1 :])


def test_parts_lie_where_their_equations_say() -> None:
    z, y, x = Grid((1, 1, 1), (1.0, 1.0, 1.0), (3.0, 0.0, 0.0)).axes()
    assert Ellipsoid((0, 0, 0), (4, 8, 8), 0).depth(z, y, x).item() == pytest.approx(1.0)
    tube = Tube((-10, 0, 0), (10, 0, 0), 5, 0)
    assert tube.depth(z, y + 2, x).item() == pytest.approx(3.0)
    assert tube.depth(z + 9, y, x).item() == pytest.approx(3.0)  # 2 mm beyond its round end
    assert Tube((-10, 0, 0), (10, 0, 0), 4, 0, taper=0.5).depth(z + 7, y, x).item() == pytest.approx(2.0)


# -------------------------------------------------------------------------------------------------------------- files


def test_a_ct_hospital_reads_back_as_the_volumes_it_was_made_from(tmp_path: Path) -> None:
    config = PhantomConfig.model_validate({"kind": "ct", "patients": 3, "seed": 5, **SMALL})
    scans = hospital("ct", tmp_path)
    assert len(scans) == 3
    for number, (file, scan) in enumerate(sorted(scans, key=lambda found: Path(found[0]).parent)):
        draws = np.random.default_rng([5, number])
        body = draw_body(draws, lesion=bool(draws.random() < config.lesion_share))
        assert Path(file).parent.name == f"PHANTOM-5-{number:04d}"
        assert scan.modality == "CT"
        assert scan.spacing_mm == pytest.approx(config.volume_spacing_mm)
        np.testing.assert_array_equal(scan.voxels[0], ct(body, config, draws))


def test_slices_of_a_series_are_not_named_in_their_order(tmp_path: Path) -> None:
    file, _ = hospital("ct", tmp_path, patients=1)[0]
    names = sorted((tmp_path / "scans" / file).parent.iterdir())
    assert len(names) == SMALL["volume_shape"][0]
    origin, _ = next(iter(read_scans([DataSource(folder=tmp_path / "scans")])))
    assert list(origin.files) not in (sorted(origin.files), sorted(origin.files, reverse=True))


def test_a_cr_hospital_reads_back_bright_bones_whatever_the_detector_stored(tmp_path: Path) -> None:
    scans = hospital("cr", tmp_path, patients=12)
    assert len(scans) >= 12
    for _, scan in scans:
        assert scan.modality == "XR"
        assert scan.rank == 2
        picture = scan.voxels[0]
        spine, corner = picture[90:, 75:85].mean(), picture[60:, :8].mean()
        assert spine > corner + 1000  # air beside the body is dark


def test_a_mixed_hospital_holds_a_volume_and_x_rays_of_each_patient(tmp_path: Path) -> None:
    scans = hospital("mixed", tmp_path, patients=4)
    ranks = [(Path(file).parent.name, scan.rank) for file, scan in scans]
    assert {patient for patient, rank in ranks if rank == 3} == {patient for patient, rank in ranks if rank == 2}
    assert len({patient for patient, _ in ranks}) == 4
    volume = next(scan for file, scan in scans if file.endswith("PHANTOM-5-0002/ct.nii.gz"))
    config = PhantomConfig.model_validate({"kind": "mixed", "patients": 4, "seed": 5, **SMALL})
    draws = np.random.default_rng([5, 2])
    body = draw_body(draws, lesion=bool(draws.random() < config.lesion_share))
    np.testing.assert_array_equal(volume.voxels[0], ct(body, config, draws))


@pytest.mark.parametrize("kind", ["cr", "ct", "mixed"])
def test_the_table_names_every_file_once_with_its_patient_and_label(kind: str, tmp_path: Path) -> None:
    hospital(kind, tmp_path, patients=5)
    rows = table(tmp_path)
    assert sorted(row["file"] for row in rows) == sorted(
        path.relative_to(tmp_path).as_posix() for path in (tmp_path / "scans").rglob("*.*")
    )
    labels = {(row["patient"], row["lesion"], row["finding"]) for row in rows}
    assert len(labels) == 5  # one label for each patient
    assert {lesion == "0" for _, lesion, _ in labels} == {True, False}
    assert all((lesion == "0") == (finding == "none") for _, lesion, finding in labels)


@pytest.mark.parametrize("kind", ["cr", "ct", "mixed"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(kind: str, tmp_path: Path) -> None:
    def bytes_of(name: str, seed: int) -> list[str]:
        hospital(kind, tmp_path / name, patients=2, seed=seed)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    first = bytes_of("a", 5)
    assert first == bytes_of("b", 5)
    assert not set(first) & set(bytes_of("c", 6))


def test_the_share_of_lesions_is_kept(tmp_path: Path) -> None:
    for share, expected in ((0.0, {"0"}), (1.0, {"1"})):
        config = PhantomConfig.model_validate({"kind": "ct", "patients": 2, "lesion_share": share, **SMALL})
        write_hospital(config, tmp_path / str(share))
        assert {row["lesion"] for row in table(tmp_path / str(share))} == expected
