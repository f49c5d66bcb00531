"""As much of S3 as listing, reading and writing files needs, on this machine, over a dict of buckets."""

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.helpers import web

KEY, SECRET = "AKIDEXAMPLE", "not-a-real-secret"
DATE = "2026-01-01T00:00:00.000Z"


class S3(ThreadingHTTPServer):
    """``buckets`` is ``{bucket: {key: content}}``; ``order`` lists what was written, in order."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.buckets, self.order, self.faults, self.headers_seen = {}, [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _asked(self):
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        return bucket, key, parse_qs(parts.query, keep_blank_values=True)

    def _answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, code, name):
        self._answer(code, f"<Error><Code>{name}</Code><Message>{name}</Message></Error>".encode())

    def _refused(self):
        self.server.headers_seen.append(self.headers.get("Authorization", ""))
        bucket, _, _ = self._asked()
        if f"Credential={KEY}/" not in self.headers.get("Authorization", ""):
            self._error(403, "AccessDenied")
        elif bucket not in self.server.buckets:
            self._error(404, "NoSuchBucket")
        elif self.server.faults:
            self._error(*self.server.faults.pop(0))
        else:
            return False
        return True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if self._refused():
            return
        bucket, key, query = self._asked()
        files = self.server.buckets[bucket]
        if not key:
            return self._list(files, query.get("prefix", [""])[0], query.get("delimiter", [""])[0], bucket)
        if key not in files:
            return self._error(404, "NoSuchKey")
        data, part = files[key], self.headers.get("Range")
        about = {"ETag": _tag(data), "Last_Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        if part:
            first, last = (int(n) if n else len(data) - 1 for n in part.removeprefix("bytes=").split("-"))
            about["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._answer(206, data[first : last + 1], **about)
        if self.command == "HEAD":
            self.send_response(200)
            for name, value in {**about, "Content_Length": str(len(data))}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
        else:
            self._answer(200, data, **about)

    def _list(self, files, prefix, delimiter, bucket):
        rows, folders = [], set()
        for key in sorted(k for k in files if k.startswith(prefix)):
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                rows.append(
                    f"<Contents><Key>{escape(key)}</Key><LastModified>{DATE}</LastModified>"
                    f"<ETag>{escape(_tag(files[key]))}</ETag><Size>{len(files[key])}</Size>"
                    "<StorageClass>STANDARD</StorageClass></Contents>"
                )
        rows += [f"<CommonPrefixes><Prefix>{escape(f)}</Prefix></CommonPrefixes>" for f in sorted(folders)]
        self._answer(
            200,
            f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
            f"<Prefix>{escape(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<IsTruncated>false</IsTruncated>{''.join(rows)}</ListBucketResult>".encode(),
        )

    def do_PUT(self):
        data = self._body()
        if not self._refused():
            bucket, key, _ = self._asked()
            self.server.buckets[bucket][key] = data
            self.server.order.append(key)
            self._answer(200, ETag=_tag(data))

    def _body(self):
        """The content of a request, plain or in the chunks that AWS signs."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "aws-chunked" not in self.headers.get("Content-Encoding", ""):
            return data
        plain = b""
        while data:
            head, _, data = data.partition(b"\r\n")
            if not (size := int(head.split(b";")[0], 16)):
                break
            plain, data = plain + data[:size], data[size + 2 :]
        return plain

    def do_DELETE(self):
        if not self._refused():
            bucket, key, _ = self._asked()
            self.server.buckets[bucket].pop(key, None)
            self._answer(204)


def _tag(data):
    return f'"{hashlib.md5(data).hexdigest()}"'


def serving():
    """A running store."""
    return web.serving(S3)
