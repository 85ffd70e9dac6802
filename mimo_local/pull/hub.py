"""The hub as HTTP: what a repository holds at a commit, and any range of its files' bytes.

Listings go through the hub's own library; bytes through ranged requests of ours, because the
library starts a file anew in every run. A token goes to the hub's own address only, never to where
a redirect leads. Knows no model and no disk. Called by `remote` and `fetch`.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from mimo_local.errors import DownloadError, UsageError
from mimo_local.pull.patience import Patience, TransientError, Wait

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

ENDPOINT: Final = "https://huggingface.co"
TIMEOUT: Final = 30.0
"""Seconds without a byte after which a connection counts as dropped."""
REDIRECTS: Final = 6
SLICE: Final = 1 << 18
"""Bytes handed on at a time."""
_REPO: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository: its bytes and what proves them right."""

    name: str
    size: int
    sha256: str
    """Of files in large storage; empty for those kept in git."""
    git: str
    """Git's own SHA-1 of the blob, for the others."""

    @property
    def digest(self) -> str:
        """What its checksum must be."""
        return self.sha256 or self.git

    def hasher(self) -> Any:
        """What makes that checksum of the content; git's begins with the size."""
        if self.sha256:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)

    @property
    def identity(self) -> str:
        """Tells this content from any other."""
        return f"{self.digest} {self.size}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A repository at one commit: the files at its top, by name."""

    repo: str
    commit: str
    files: dict[str, RemoteFile]


def check_repo(repo: str) -> str:
    """The same name, if it is one: `owner/name`; UsageError."""
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise UsageError(
            f"`{repo}` is not a repository",
            hint="write it as on the hub: owner/name, like XiaomiMiMo/MiMo-V2-Flash",
        )
    return repo


class Hub:
    """One endpoint and one token; may be used by several threads."""

    def __init__(
        self, *, wait: Wait | None = None, on_wait: Callable[[str], None] | None = None
    ) -> None:
        """At HF_ENDPOINT, or the public hub. `wait` sleeps; `on_wait` is told why."""
        quiet()
        import httpx2

        given = os.environ.get("HF_ENDPOINT") or ENDPOINT
        self.endpoint = given.rstrip("/")
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(
                f"HF_ENDPOINT is {given!r}, which is no address of a hub",
                hint="write it like https://huggingface.co, or unset it",
            )
        self._closed = threading.Event()
        self._wait = wait or self._closed.wait
        self._on_wait = on_wait
        self._token = _token()
        self._places: dict[str, str] = {}
        try:
            self._client = httpx2.Client(timeout=TIMEOUT, follow_redirects=False)
        except (ValueError, ImportError) as error:  # a proxy of a kind it does not speak
            raise DownloadError(
                f"the proxy settings cannot be used: {error}",
                hint="correct HTTPS_PROXY, HTTP_PROXY or ALL_PROXY: http://host:port",
            ) from error

    def close(self) -> None:
        """End all connections and waits."""
        self._closed.set()
        self._client.close()

    def snapshot(self, repo: str, revision: str) -> Snapshot:
        """The files of `repo` at the commit `revision` means now; DownloadError."""
        check_repo(repo)
        commit = self.commit(repo, revision)
        entries = self._asked(repo, revision, lambda api: list(api.list_repo_tree(
            repo, recursive=False, revision=commit)))  # fmt: skip
        files = {}
        for entry in entries:
            size, lfs = getattr(entry, "size", None), getattr(entry, "lfs", None)
            if type(size) is not int or size < 0 or not _plain(entry.path):
                continue  # a folder, or a name no file of a model has
            sha256 = str(lfs.sha256) if lfs else ""
            files[entry.path] = RemoteFile(entry.path, size, sha256, str(entry.blob_id))
        return Snapshot(repo, commit, files)

    def commit(self, repo: str, revision: str) -> str:
        """The commit a branch, tag or abbreviated commit means now."""
        commit = self._asked(repo, revision, lambda api: api.model_info(
            repo, revision=revision, timeout=TIMEOUT)).sha  # fmt: skip
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise self._strange(f"it names no commit for {repo}")
        return commit

    @contextmanager
    def ranged(
        self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int
    ) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Bytes start..stop of a file: the offset they begin at, then pieces of them.

        The offset is 0 where the server ignores ranges; it may send more or fewer bytes than asked.
        TransientError for what another try may heal, DownloadError for the rest.
        """
        import httpx2

        try:
            response = self._open(snapshot, file, {"Range": f"bytes={start}-{stop - 1}"})
            try:
                yield self._offset(response, file, start), response.iter_raw(SLICE)
            finally:
                response.close()
        except (httpx2.TransportError, httpx2.StreamError) as error:
            self._places.pop(file.name, None)
            raise TransientError(_reason(error)) from error

    def read(self, snapshot: Snapshot, file: RemoteFile, start: int, stop: int) -> bytes:
        """Bytes start..stop in memory, tried again until they are here."""
        patience, found = Patience(self._wait, self._on_wait), bytearray()
        while len(found) < stop - start:
            try:
                at = start + len(found)
                with self.ranged(snapshot, file, at, stop) as (offset, pieces):
                    for piece in pieces:
                        if offset + len(piece) > at:
                            found += piece[max(0, at - offset) :]
                            at = start + len(found)
                            patience.moved()
                        offset += len(piece)
                        if at >= stop:
                            break
                if at < stop:
                    raise TransientError("the connection ended early")
            except TransientError as failure:
                patience.again(failure, file.name)
        return bytes(found[: stop - start])

    def _open(self, snapshot: Snapshot, file: RemoteFile, headers: dict[str, str]) -> Any:
        """The response that carries the bytes, redirects followed; the last place is kept."""
        path = f"/{snapshot.repo}/resolve/{snapshot.commit}/{quote(file.name)}"
        url = first = self._places.get(file.name, self.endpoint + path)
        for _ in range(REDIRECTS):
            request = self._client.build_request("GET", url, headers=headers | self._headers(url))
            response = self._client.send(request, stream=True)
            linked = response.headers.get("X-Linked-Etag", "").strip('"').removeprefix('W/"')
            if file.sha256 and linked and linked != file.sha256:
                response.close()
                raise _changed(file)
            if not response.is_redirect:
                break
            response.close()
            url = urljoin(url, response.headers["Location"])
            if urlsplit(url).scheme not in ("http", "https"):
                raise self._strange(f"it redirects {file.name} to {url[:60]!r}")
        else:
            raise self._strange(f"it redirects {file.name} in circles")
        if response.status_code in (200, 206):
            self._places[file.name] = url
            return response
        self._places.pop(file.name, None)
        try:
            self._refused(response, snapshot, file, fresh=first == self.endpoint + path)
        finally:
            response.close()

    def _headers(self, url: str) -> dict[str, str]:
        """What a request carries; the token only at the hub's own scheme, host and port."""
        import mimo_local

        headers = {"Accept-Encoding": "identity"}
        headers["User-Agent"] = f"mimo-local/{mimo_local.__version__}"
        if self._token and _origin(url) == _origin(self.endpoint):
            headers["Authorization"] = f"Bearer {self._token}"
        return headers

    def _offset(self, response: httpx2.Response, file: RemoteFile, start: int) -> int:
        if response.status_code == 200:
            length = response.headers.get("Content-Length")
            if length is not None and length != str(file.size):
                raise _changed(file)
            return 0
        told = re.fullmatch(
            r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip()
        )
        if told is None or int(told[1]) != start:
            raise TransientError("the server answered with other bytes than asked for")
        if told[2] not in ("*", str(file.size)):
            raise _changed(file)
        return start

    def _refused(
        self, response: httpx2.Response, snapshot: Snapshot, file: RemoteFile, *, fresh: bool
    ) -> NoReturn:
        """Raise what an answer that is no file means."""
        status = response.status_code
        ours = _origin(str(response.request.url)) == _origin(self.endpoint)
        if status in (408, 425, 429) or status >= 500:
            raise TransientError(f"the server answered {status}", retry_after(response.headers))
        if not ours and (not fresh or status in (401, 403, 404, 410)):
            # An address given out by the hub expires: it is asked for another one.
            raise TransientError(f"{urlsplit(str(response.request.url)).hostname} said {status}")
        if status in (401, 403):
            raise self._denied(snapshot.repo, response.headers.get("X-Error-Code") == "GatedRepo")
        if status == 416:
            raise _changed(file)
        raise DownloadError(
            f"{file.name} of {snapshot.repo} at {snapshot.commit[:12]} cannot be fetched: "
            f"{self.endpoint} answered {status}",
            hint="the commit may have been removed: `--restart` begins anew with what is there now"
            if status == 404
            else "try again later; another mirror can be named in HF_ENDPOINT",
        )

    def _asked(self, repo: str, revision: str, question: Callable[[Any], T]) -> T:
        """What the hub's library answers, its errors in our terms; DownloadError."""
        import httpx2
        from huggingface_hub import HfApi, errors, set_client_factory

        # Its own client would wait for a silent server for ever.
        set_client_factory(lambda: httpx2.Client(timeout=TIMEOUT, follow_redirects=True))
        from mimo_local import __version__

        api = HfApi(self.endpoint, self._token or False, "mimo-local", __version__)
        patience = Patience(self._wait, self._on_wait)
        while True:
            try:
                return question(api)
            except errors.GatedRepoError as error:
                raise self._denied(repo, gated=True) from error
            except errors.RevisionNotFoundError as error:
                raise DownloadError(
                    f"{repo} has no revision `{revision}`",
                    hint=f"{self.endpoint}/{repo} lists its branches and tags",
                ) from error
            except errors.RepositoryNotFoundError as error:
                raise self._denied(repo, gated=False, missing=True) from error
            except errors.HFValidationError as error:
                raise UsageError(
                    f"`{repo}` is not a repository", hint="write it as on the hub: owner/name"
                ) from error
            except errors.HfHubHTTPError as error:
                status = error.response.status_code
                if status in (401, 403):
                    raise self._denied(repo, gated=False) from error
                if status != 429 and status < 500:
                    raise self._strange(f"it answered {status} when asked for {repo}") from error
                failure = TransientError(
                    f"it answered {status}", retry_after(error.response.headers)
                )
                patience.again(failure, repo)
            except httpx2.TransportError as error:
                patience.again(TransientError(_reason(error)), repo)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise self._strange(f"its answer about {repo} is no listing") from error

    def _denied(self, repo: str, gated: bool, missing: bool = False) -> DownloadError:
        page = f"{self.endpoint}/{repo}"
        login = "set HF_TOKEN to a token that may read it, or run `hf auth login`"
        if gated:
            return DownloadError(
                f"{repo} is gated: its owners want their terms accepted first",
                hint=f"accept them at {page}, then {login}",
            )
        if missing and not self._token:
            text = f"there is no public repository {repo} at {self.endpoint}"
            return DownloadError(text, hint=f"check the name; if it is private, {login}")
        if missing:
            text = f"there is no repository {repo} at {self.endpoint} that your token may read"
            return DownloadError(text, hint=f"check the name at {page}, or {login}")
        what = "the token was refused" if self._token else "it asks for a token"
        return DownloadError(f"{repo} cannot be read: {what}", hint=f"{login} ({page})")

    def _strange(self, what: str) -> DownloadError:
        return DownloadError(
            f"{self.endpoint} does not answer as a hub does: {what}",
            hint="check HF_ENDPOINT, and whether a login page or a proxy stands in between",
        )


def quiet() -> None:
    """The hub's library without telemetry, update checks, progress bars and retry warnings."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"):
        os.environ[name] = "1"
    from huggingface_hub import constants, utils

    constants.HF_HUB_DISABLE_TELEMETRY = True  # it may have been imported before
    constants.HF_HUB_DISABLE_UPDATE_CHECK = True
    shown: Any = utils
    shown.logging.set_verbosity_error()
    shown.disable_progress_bars()


def retry_after(headers: Any) -> float | None:
    """Seconds the server wants to be left alone: Retry-After (number or date), or RateLimit."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", text, re.ASCII):
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    told = re.search(r"\bt=(\d{1,9})\b", headers.get("RateLimit", ""), re.ASCII)
    return float(told[1]) if told else None


def _token() -> str:
    """The user's token: HF_TOKEN, or what `hf auth login` stored; empty without one."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return ""
    token = (get_token() or "").strip()
    if not token.isascii() or not token.isprintable():
        raise UsageError(
            "HF_TOKEN holds characters that no token has", hint="copy the token again from the hub"
        )
    return token


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    default = 443 if parts.scheme == "https" else 80
    return parts.scheme, (parts.hostname or "").lower(), parts.port or default


def _plain(name: str) -> bool:
    """A name that stays in its folder and does nothing to a terminal."""
    return name.isprintable() and not name.startswith(".") and not set(name) & set("/\\:")


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def _changed(file: RemoteFile) -> DownloadError:
    return DownloadError(
        f"{file.name} is not the file it was when this pull began",
        hint="`--restart` begins anew with what the repository holds now",
    )
