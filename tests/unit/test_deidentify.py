"""What becomes of the elements of a file, and of a result on its way back; without any server."""

from __future__ import annotations

import io
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.data import get_testdata_files
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID

from orthanc_events_bridge.consumers.configuration import CommandLine, configure_as
from orthanc_events_bridge.errors import BridgeError
from orthanc_events_bridge.loading import ConfigError
from orthanc_events_bridge.testing.dicom import make_study
from orthanc_events_bridge.workflows.anonymizer_settings import AnonymizerSettings, Project
from orthanc_events_bridge.workflows.deidentify import LeftOutError, Pseudonymised, pseudonymise
from orthanc_events_bridge.workflows.dicom_files import UnreadableFileError
from orthanc_events_bridge.workflows.profile import Profile, entry_of
from orthanc_events_bridge.workflows.pseudonyms import Pseudonyms
from orthanc_events_bridge.workflows.reidentify import Result

ROOT_FOLDER = Path(__file__).resolve().parents[2]
PSEUDONYMS = Pseudonyms("trial", b"0123456789abcdef")
OTHERS = Pseudonyms("trial", b"fedcba9876543210")


def changed(**elements: Any) -> bytes:
    """A file with these elements."""
    dataset = pydicom.dcmread(io.BytesIO(make_study(patient_id="P-4711").instances[0].data))
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def made(content: bytes, **profile: Any) -> Any:
    """What becomes of it, read."""
    return pydicom.dcmread(io.BytesIO(done(content, **profile).content))


def done(content: bytes, **profile: Any) -> Pseudonymised:
    return pseudonymise(content, Profile(**profile), PSEUDONYMS)


def item(**elements: Any) -> Dataset:
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def test_the_same_file_profile_and_secret_give_the_same_bytes_and_another_secret_others() -> None:
    content = changed(ReferencedImageSequence=[item(ReferencedSOPInstanceUID="1.2.3.4.5")])
    first, other = done(content), pseudonymise(content, Profile(), OTHERS)
    assert first == done(content)
    assert {first.uid, first.study, first.patient}.isdisjoint({other.uid, other.study, other.patient})
    assert len(first.uids) == 4 and all(len(uid) <= 64 and uid.startswith("2.25.") for uid in first.uids)
    assert first.uids[PSEUDONYMS.uid("1.2.3.4.5")] == "1.2.3.4.5"
    assert "P-4711" not in repr(first)


def test_what_refers_to_something_refers_to_what_became_of_it() -> None:
    content = changed(
        FrameOfReferenceUID="1.2.3.4.9",
        ReferencedImageSequence=[
            item(ReferencedSOPClassUID="1.2.840.10008.5.1.4.1.1.2", ReferencedSOPInstanceUID="1.2.3")
        ],
    )
    found = made(content)
    assert found.ReferencedImageSequence[0].ReferencedSOPInstanceUID == PSEUDONYMS.uid("1.2.3")
    assert found.ReferencedImageSequence[0].ReferencedSOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
    assert found.FrameOfReferenceUID == PSEUDONYMS.uid("1.2.3.4.9")
    assert found.file_meta.MediaStorageSOPInstanceUID == found.SOPInstanceUID


def test_dates_go_or_stay_or_move_all_by_the_same() -> None:
    sequence = [item(StudyDate="20240103")]
    content = changed(
        StudyDate="20240101",
        AcquisitionDateTime="20240102101112.5+0100",
        ContentDate="2024",
        PatientBirthDate="19660401",
        StudyTime="0304",
        RequestAttributesSequence=sequence,
        ScheduledProcedureStepStartDate="20240105",
        DateOfSecondaryCapture="20240110",
        ReferencedStudySequence=[],
        CalibrationDate=["20240101", "20240102"],
    )
    assert made(content).StudyDate == ""
    assert made(content, dates="keep").AcquisitionDateTime == "20240102101112.5+0100"
    shifted = made(content, dates="shift", shift_days=30)
    days = PSEUDONYMS.days("P-4711", 30)
    assert 1 <= days <= 30
    assert shifted.StudyDate == f"{date(2024, 1, 1) - timedelta(days):%Y%m%d}"
    first, second = shifted.CalibrationDate
    assert int(second[:4]) >= 2023 and first == shifted.StudyDate and first < second
    assert shifted.AcquisitionDateTime == f"{second}101112.5+0100"
    assert shifted.ContentDate == "" and shifted.StudyTime == "0304"
    for policy, mark in (("keep", "UNMODIFIED"), ("shift", "MODIFIED"), ("remove", "REMOVED")):
        found = made(content, dates=policy)
        assert found.PatientBirthDate == "" and found.LongitudinalTemporalInformationModified == mark


def test_own_lists_reach_into_sequences_and_the_longest_path_counts() -> None:
    inside = item(RequestedProcedureDescription="inside", InstitutionName="Here")
    content = changed(
        StudyDescription="about",
        SeriesDescription="more",
        InstitutionName="Here",
        ProtocolName="Knee",
        SliceThickness="3",
        RequestAttributesSequence=[inside],
    )
    lists = {
        "keep": ("StudyDescription", "RequestAttributesSequence", "RequestedProcedureDescription"),
        "remove": ("SliceThickness", "RequestAttributesSequence.InstitutionName"),
        "replace": {"InstitutionName": "Trial", "ProtocolName": "Some"},
    }
    assert made(content).get("StudyDescription") is None
    found = made(content, **lists)
    assert (found.StudyDescription, found.InstitutionName, found.ProtocolName) == ("about", "Trial", "Some")
    assert "SliceThickness" not in found and "SeriesDescription" not in found
    assert found.RequestAttributesSequence[0].RequestedProcedureDescription == "inside"
    assert "InstitutionName" not in found.RequestAttributesSequence[0]


def test_options_of_the_standard_keep_what_they_name() -> None:
    content = changed(DeviceSerialNumber="S1", InstitutionName="Here", PatientAge="050Y", PatientSex="F")
    kept = {"device": "DeviceSerialNumber", "institution": "InstitutionName", "patient": "PatientAge"}
    for option, keyword in kept.items():
        found = made(content, retain=(option,))
        # What the basic profile doesn't remove it gives another value.
        before = pydicom.dcmread(io.BytesIO(content))
        same = {name for name in kept.values() if found.get(name) == before.get(name)}
        assert same == {keyword}
        assert len(found.DeidentificationMethodCodeSequence) == 2
    assert made(content, retain=("patient",)).PatientSex == "F"


def test_private_elements_go_but_for_those_that_are_named() -> None:
    dataset = pydicom.dcmread(io.BytesIO(changed()))
    for creator in ("ACME", "OTHER"):
        block = dataset.private_block(0x0011, creator, create=True)
        block.add_new(1, "LO", f"{creator} 1")
        block.add_new(0x1C, "DS", "1.5")
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    assert not [one for one in made(file.getvalue()) if one.tag.is_private]
    found = made(file.getvalue(), private={"ACME": ("1C",)})
    assert [one.value for one in found if one.tag.is_private] == ["ACME", 1.5]
    found = made(file.getvalue(), private={"OTHER": ("all",)})
    assert [one.value for one in found if one.tag.is_private] == ["OTHER", "OTHER 1", 1.5]


def test_a_name_that_was_typed_where_none_belongs_is_found() -> None:
    content = changed(
        PatientName="Müller^Jürg", SeriesDescription="x", ScanOptions=["FS", "MÜLLER"], BodyPartExamined="KNEE P-4711"
    )
    found = made(content)
    assert found.ScanOptions == ["FS", ""] and found.BodyPartExamined == ""


def test_an_id_that_is_said_in_a_sequence_only_is_found_elsewhere() -> None:
    content = changed(OtherPatientIDsSequence=[item(PatientID="ELSEWHERE-77")], ScanOptions="ELSEWHERE-77")
    found = made(content)
    assert found.ScanOptions == "" and "OtherPatientIDsSequence" not in found


def test_texts_in_any_character_set_stay_what_they_are() -> None:
    content = changed(
        SpecificCharacterSet=["ISO 2022 IR 13", "ISO 2022 IR 87"],
        StudyDescription="膝の検査",
        PatientName="ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎",
    )
    result = done(content, keep=("StudyDescription",))
    assert pydicom.dcmread(io.BytesIO(result.content)).StudyDescription == "膝の検査"
    assert result.identity["PatientName"].startswith("ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎")


def test_what_is_not_to_be_pseudonymised_is_said() -> None:
    for elements, why in (
        ({"PatientIdentityRemoved": "YES"}, "it is de-identified already"),
        ({"BurnedInAnnotation": "YES"}, "there is text in its pixels"),
    ):
        with pytest.raises(LeftOutError, match=why):
            done(changed(**elements))
    assert made(changed(BurnedInAnnotation="YES"), burned_in="keep").BurnedInAnnotation == "YES"
    with pytest.raises(UnreadableFileError) as caught:
        done(b"Zwetschgenmann")
    assert "Zwetschgenmann" not in str(caught.value) and caught.value.__cause__ is None


def test_patients_without_an_id_are_not_made_one() -> None:
    one, other = (done(changed(PatientID="", StudyInstanceUID=uid)) for uid in ("1.2.3", "1.2.4"))
    assert one.patient != other.patient


def test_a_name_in_place_of_a_number_is_found_too() -> None:
    content = changed(EchoTrainLength="12345678").replace(b"12345678", b"P-4711  ")
    result = done(content)
    assert b"P-4711" not in result.content
    assert pydicom.dcmread(io.BytesIO(result.content)).Modality == "CT"


SAMPLES = [path for path in map(Path, get_testdata_files("*.dcm")) if path.stat().st_size < 1_000_000]


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, of its own samples
@pytest.mark.parametrize("path", SAMPLES, ids=[path.name for path in SAMPLES])
def test_files_of_all_sorts_keep_their_pixels_and_lose_their_patient(path: Path) -> None:
    content = path.read_bytes()
    try:
        before = pydicom.dcmread(io.BytesIO(content))
        result = done(content)
    except (LeftOutError, UnreadableFileError, pydicom.errors.InvalidDicomError):
        return
    after = pydicom.dcmread(io.BytesIO(result.content))
    assert after.get("PixelData") == before.get("PixelData")
    assert after.file_meta.TransferSyntaxUID == before.file_meta.TransferSyntaxUID
    assert after.SOPClassUID == before.SOPClassUID
    for value in (str(before.get("PatientName")), str(before.get("PatientID")), str(before.StudyInstanceUID)):
        assert len(value) < 6 or value.encode() not in result.content, value
    assert not [one for one in after if one.tag.is_private]


def test_a_result_gets_its_patient_and_all_uids_back() -> None:
    original = changed(PatientName="Doe^J", AccessionNumber="A9", StudyDate="20240101", FrameOfReferenceUID="1.2.3.4.9")
    pseudonymised = done(original)
    dataset = pydicom.dcmread(io.BytesIO(pseudonymised.content))
    reference = item(ReferencedSOPClassUID=dataset.SOPClassUID, ReferencedSOPInstanceUID=dataset.SOPInstanceUID)
    dataset.SourceImageSequence = [reference]
    dataset.SOPInstanceUID, dataset.SeriesInstanceUID = UID("1.9.8.1"), UID("1.9.8.2")
    dataset.file_meta.MediaStorageSOPInstanceUID = UID("1.9.8.1")
    dataset.StudyID = "AI's"
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)

    def back() -> bytes:
        result = Result.read(file.getvalue())
        originals = {uid: one for uid, one in pseudonymised.uids.items() if uid in result.uids}
        return result.give_back(pseudonymised.identity, pseudonymised.patient, originals, PSEUDONYMS)

    assert back() == back()
    found, source = pydicom.dcmread(io.BytesIO(back())), pydicom.dcmread(io.BytesIO(original))
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber", "StudyDate", "StudyID"):
        assert found.get(keyword) == source.get(keyword), keyword
    assert found.FrameOfReferenceUID == "1.2.3.4.9"
    assert found.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert found.SourceImageSequence[0].ReferencedSOPClassUID == source.SOPClassUID
    assert (found.SOPInstanceUID, found.SeriesInstanceUID) == (
        PSEUDONYMS.result("1.9.8.1"),
        PSEUDONYMS.result("1.9.8.2"),
    )
    assert found.PatientIdentityRemoved == "NO" and "DeidentificationMethod" not in found


def test_the_table_is_the_standards() -> None:
    rows = {0x00100010: "Z", 0x00200010: "Z", 0x00080018: "U", 0x0040A730: "D", 0x50043000: "X", 0x60103000: "X"}
    for tag, action in rows.items():
        found = entry_of(tag)
        assert found is not None and found.action == action
    assert entry_of(0x60100010) is None and entry_of(0x00280010) is None


class TestSettings:
    TEXT = """\
broker: nats://127.0.0.1:4222
store: sqlite:////tmp/x.db
projects:
  trial: {secret_file: secret, profile: mine}
profiles:
  mine: {keep: [StudyDescription]}
rules:
  - {name: all, to: [trial]}
"""

    def read(self, folder: Path, text: str) -> AnonymizerSettings:
        path = folder / "anonymizer.yaml"
        path.write_text(text, "utf-8")
        return configure_as(AnonymizerSettings, {}, path, {}, CommandLine()).settings

    @pytest.mark.parametrize(
        ("right", "wrong", "message"),
        [
            ("[trial]", "[trail]", "8: rules[0].to[0]: 'trail' is no project; the projects are: trial"),
            ("profile: mine", "profile: yours", "4: projects.trial.profile: 'yours' is no profile"),
            ("[StudyDescription]", "[StudyDescr]", "6: profiles.mine.keep[0]: 'StudyDescr' is no keyword"),
            ("[StudyDescription]", "[PatientID]", "6: profiles.mine.keep[0]: 'PatientID' is always made by"),
            (
                "keep: [StudyDescription]",
                "replace: {Rows: '1'}",
                "'Rows' is no attribute of text; keep it or remove it",
            ),
            ("keep:", "remove: [StudyDescription], keep:", "is in keep too; name it once"),
            ("keep: [StudyDescription]", "private: {ACME: [101]}", "is no element of a private block"),
        ],
    )
    def test_a_mistake_names_its_line_and_what_would_be_right(
        self, tmp_path: Path, right: str, wrong: str, message: str
    ) -> None:
        self.read(tmp_path, self.TEXT)
        assert right in self.TEXT
        with pytest.raises(ConfigError) as caught:
            self.read(tmp_path, self.TEXT.replace(right, wrong))
        assert message in str(caught.value)

    def test_the_example_is_right(self) -> None:
        path = ROOT_FOLDER / "config" / "anonymizer.yaml"
        found = configure_as(AnonymizerSettings, {}, path, {}, CommandLine()).settings
        assert set(found.projects) == {"trial-7", "teaching"}

    def test_a_secret_comes_from_a_file_or_the_environment_and_is_long_enough(self, tmp_path: Path) -> None:
        file = tmp_path / "secret"
        with pytest.raises(BridgeError, match="can't be read"):
            Project(secret_file=file).secret("trial-7")
        file.write_text("0123456789abcdef\n", "utf-8")
        assert Project(secret_file=file).secret("trial-7") == b"0123456789abcdef"
        variable = "ORTHANC_EVENTS_SECRET_TRIAL_7"
        assert Project().secret("trial-7", {variable: "0123456789abcdef"}) == b"0123456789abcdef"
        for environment in ({}, {variable: "short"}):
            with pytest.raises(BridgeError, match="no secret, or too short a one") as caught:
                Project().secret("trial-7", environment)
            assert variable in caught.value.remedy and "short" not in caught.value.remedy


def test_several_values_stay_several() -> None:
    found = made(changed(ImageType=["ORIGINAL", "PRIMARY", "P-4711"]))
    assert isinstance(found.ImageType, MultiValue) and list(found.ImageType) == ["ORIGINAL", "PRIMARY", ""]
