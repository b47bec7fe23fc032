//! The daemon's socket: one JSON object a line, for `status`, `checkpoint`, `verify`, decisions and points.
//!
//! A request is one line; the answer is any number of progress lines and one last line.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use coldspare_core::control::Taking;

use crate::exit::{Code, Failure};
use crate::promotion::Terms;

/// What the daemon is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Where it stands.
    Status,
    /// Answer when all that was written before now is durable on the standby.
    Checkpoint {
        /// Milliseconds to wait at most.
        timeout_ms: u64,
    },
    /// Compare the tree with the manifest.
    Verify(Asked),
    /// Decide about what waits for a person.
    Decide {
        /// Whether it is applied.
        accept: bool,
    },
    /// List the points.
    Points,
    /// Go back to a point.
    Rewind {
        /// As a person names it.
        to: String,
    },
    /// Write a point into a folder.
    Export {
        /// As a person names it.
        point: String,
        /// The folder, absolute.
        dir: PathBuf,
    },
    /// Take changesets again after that.
    Resume,
    /// Make this standby the active.
    Promote(Terms),
    /// Give the active's role over.
    HandOver {
        /// When the standby takes it.
        taking: Taking,
        /// What is held back is accepted as lost.
        accept_held_back: bool,
        /// Milliseconds until it is given up, if it isn't ready by then.
        timeout_ms: u64,
    },
}

/// How closely to look at the standby, and what to do about what is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Asked {
    /// Every byte, not only metadata.
    pub(crate) deep: bool,
    /// Repositories too.
    #[serde(default)]
    pub(crate) git: bool,
    /// Put right what differs.
    #[serde(default)]
    pub(crate) repair: bool,
    /// Every byte, from where an earlier run was broken off.
    #[serde(default)]
    pub(crate) resume: bool,
    /// Bytes a second to read at most; 0: as many as there are. Without it, as configured.
    #[serde(default)]
    pub(crate) bytes_per_second: Option<u64>,
}

/// A line of the answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// How far it is.
    Progress(Value),
    /// Done.
    Done(Value),
    /// Not done.
    Failed {
        /// The exit code.
        code: u8,
        /// For a person.
        message: String,
    },
}

impl Reply {
    /// The last line for a failure.
    pub(crate) fn failed(failure: &Failure) -> Reply {
        Reply::Failed { code: failure.code as u8, message: failure.message.clone() }
    }
}

/// A request and where its answer goes.
pub(crate) struct Call {
    /// What is asked for.
    pub(crate) request: Request,
    /// Lines of the answer; the last one is `Done` or `Failed`.
    pub(crate) reply: mpsc::Sender<Reply>,
}

/// LIMIT: bytes of a request.
const REQUEST_BYTES_MAX: u64 = 64 << 10;
/// LIMIT: requests that wait for the daemon.
const QUEUE: usize = 16;

/// A socket's path as the kernel takes it: one that is too long goes by a descriptor of its folder.
struct Named {
    path: PathBuf,
    _folder: Option<std::fs::File>,
}

/// Bytes of a socket's address, with the NUL behind it (`unix(7)`).
const ADDRESS_BYTES_MAX: usize = 108;

impl Named {
    fn new(path: &Path) -> std::io::Result<Named> {
        let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Ok(Named { path: path.into(), _folder: None }) };
        if path.as_os_str().len() < ADDRESS_BYTES_MAX {
            return Ok(Named { path: path.into(), _folder: None });
        }
        let folder = std::fs::File::open(folder)?;
        Ok(Named { path: Path::new(&format!("/proc/self/fd/{}", folder.as_raw_fd())).join(name), _folder: Some(folder) })
    }
}

/// Listens at `path`; calls arrive at the returned channel.
///
/// # Errors
/// `Usage`, naming the path.
pub(crate) fn listen(path: &Path) -> Result<mpsc::Receiver<Call>, Failure> {
    let fail = |e: std::io::Error| Failure::usage(format!("the daemon's socket {}: {e}", path.display()));
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => return Err(fail(e)),
        _ => {}
    }
    let named = Named::new(path).map_err(fail)?;
    let listener = tokio::net::UnixListener::bind(&named.path).map_err(fail)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    let (calls, inbox) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = calls.closed() => return, // nobody answers any more: better no daemon than a dumb one
            };
            match accepted {
                Ok((stream, _)) => drop(tokio::spawn(serve(stream, calls.clone()))),
                Err(e) => {
                    tracing::warn!(error = %e, "the daemon's socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok(inbox)
}

async fn serve(stream: tokio::net::UnixStream, calls: mpsc::Sender<Call>) {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut reader = tokio::io::BufReader::new(read.take(REQUEST_BYTES_MAX));
    let read = tokio::time::timeout(Duration::from_secs(5), reader.read_line(&mut line));
    if !matches!(read.await, Ok(Ok(1..))) {
        return;
    }
    let (reply, mut lines) = mpsc::channel(QUEUE);
    match serde_json::from_str(&line) {
        Ok(request) => {
            if calls.send(Call { request, reply }).await.is_err() {
                return;
            }
        }
        Err(e) => {
            let failed = Reply::Failed { code: Code::Usage as u8, message: format!("not a request: {e}") };
            let _ = reply.send(failed).await;
            drop(reply);
        }
    }
    while let Some(reply) = lines.recv().await {
        let Ok(mut text) = serde_json::to_string(&reply) else { return };
        text.push('\n');
        if write.write_all(text.as_bytes()).await.is_err() {
            return;
        }
    }
}

/// Asks the daemon at `path`; `None` when none runs.
///
/// `progress` is called for each progress line.
///
/// # Errors
/// What the daemon answered; `Unreachable` when it breaks off or says nothing within `limit`.
pub(crate) fn ask(
    path: &Path,
    request: &Request,
    limit: Option<Duration>,
    mut progress: impl FnMut(&Value),
) -> Result<Option<Value>, Failure> {
    let mut stream = match Named::new(path).and_then(|named| UnixStream::connect(&named.path)) {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => return Ok(None),
        Err(e) => return Err(Failure::unreachable(format!("the daemon's socket {}: {e}", path.display()))),
    };
    let broken = |e: std::io::Error| match e.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Failure::unreachable("the daemon did not answer in time"),
        _ => Failure::unreachable(format!("the daemon broke off: {e}")),
    };
    stream.set_read_timeout(limit).map_err(broken)?;
    let mut text = serde_json::to_string(request).map_err(Failure::usage)?;
    text.push('\n');
    stream.write_all(text.as_bytes()).map_err(broken)?;
    for line in BufReader::new(stream).lines() {
        match serde_json::from_str(&line.map_err(broken)?) {
            Ok(Reply::Progress(value)) => progress(&value),
            Ok(Reply::Done(value)) => return Ok(Some(value)),
            Ok(Reply::Failed { code, message }) => return Err(Failure { code: code_of(code), message, passes: false }),
            Err(e) => return Err(Failure::unreachable(format!("the daemon's answer can't be read: {e}"))),
        }
    }
    Err(Failure::unreachable("the daemon stopped before it answered: its log says why; ask again once it runs"))
}

fn code_of(code: u8) -> Code {
    [Code::Done, Code::Differs, Code::Usage, Code::Unreachable, Code::Fenced].into_iter().find(|c| *c as u8 == code).unwrap_or(Code::Damage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_may_be_deep_in_folders() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(90)).join("e".repeat(90));
        std::fs::create_dir_all(&deep).unwrap();
        for path in [dir.path().join("socket"), deep.join("socket")] {
            assert!(ask(&path, &Request::Status, None, |_| ()).unwrap().is_none(), "nobody listens yet");
            let listener = std::os::unix::net::UnixListener::bind(&Named::new(&path).unwrap().path).unwrap();
            assert!(path.exists());
            let stream = UnixStream::connect(&Named::new(&path).unwrap().path).unwrap();
            drop((listener.accept().unwrap(), stream));
        }
        assert!(ask(&deep.join("gone").join("socket"), &Request::Status, None, |_| ()).unwrap().is_none());
    }
}
