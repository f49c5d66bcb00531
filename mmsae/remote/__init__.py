"""Files that lie elsewhere: found, brought whole into a bounded cache, and written whole."""

from mmsae.remote.urls import Remote, file_name, is_url

__all__ = ["Remote", "file_name", "is_url"]
