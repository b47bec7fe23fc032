//! Asks the application for its state: one GET, bounded in time and size, over TCP or a unix socket.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use crate::observation::Health;

/// Where something answers HTTP/1.1 without TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    place: Place,
    path: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// Host and port, as in the `Host` field.
    Tcp(String),
    Unix(PathBuf),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// HTTP's status.
    pub status: u16,
    /// What came with it.
    pub body: Vec<u8>,
}

/// LIMIT: bytes of an answer, head and all.
pub const RESPONSE_BYTES_MAX: usize = 64 << 10;
/// LIMIT: fields of an answer's head.
const FIELDS_MAX: usize = 64;
/// LIMIT: characters of what the application said that are told.
const TOLD_CHARS_MAX: usize = 80;

impl FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Url, String> {
        if text.bytes().any(|b| b.is_ascii_control() || b == b' ') {
            return Err(format!("{text:?}: no spaces, no control characters"));
        }
        if let Some(rest) = text.strip_prefix("unix:") {
            let (socket, path) = rest.split_once(':').unwrap_or((rest, "/status"));
            if !socket.starts_with('/') || !path.starts_with('/') {
                return Err(format!("{text:?}: expected unix:/path/of/socket or unix:/path/of/socket:/path"));
            }
            return Ok(Url { place: Place::Unix(socket.into()), path: path.into() });
        }
        let Some(rest) = text.strip_prefix("http://") else {
            return Err(format!("{text:?}: expected http://HOST:PORT/PATH or unix:/path/of/socket; for https use a command"));
        };
        let (host, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
        if host.is_empty() || host.contains('@') {
            return Err(format!("{text:?}: expected http://HOST:PORT/PATH"));
        }
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
        let host = if has_port { host.to_string() } else { format!("{host}:80") };
        Ok(Url { place: Place::Tcp(host), path: path.into() })
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::Tcp(host) => write!(f, "http://{host}{}", self.path),
            Place::Unix(socket) => write!(f, "unix:{}:{}", socket.display(), self.path),
        }
    }
}

/// Asks for the state at `url`; what gives no answer within `limit` has failed.
pub fn ask(url: &Url, limit: Duration) -> Health {
    match request(url, "GET", None, limit) {
        Ok(response) => interpret(Some(response.status), &response.body),
        Err(e) => Health::Failed(format!("{url}: {e}")),
    }
}

/// What an answer says; the status of HTTP doesn't count where there is a state.
pub fn interpret(status: Option<u16>, body: &[u8]) -> Health {
    let value: Option<serde_json::Value> = serde_json::from_slice(body).ok();
    match value.as_ref().and_then(|v| v["state"].as_str()) {
        Some("RUNNING") => Health::Running,
        Some("STARTING") => Health::Starting,
        Some("MAINTENANCE") => Health::Maintenance,
        Some("FIRST_RUN") => Health::FirstRun,
        Some("ERROR") => Health::Failed("it says ERROR".into()),
        Some(other) => Health::Unknown(other.chars().take(TOLD_CHARS_MAX).collect::<String>().escape_default().to_string()),
        None => match status {
            Some(status) => Health::Failed(format!("HTTP {status}, and no JSON with a state")),
            None => Health::Failed("no JSON with a state".into()),
        },
    }
}

/// Sends a request, with `json` as its content if there is any, and reads the whole answer.
///
/// # Errors
/// Of connecting, reading, writing; `TimedOut` after `limit`, all in all; `InvalidData`: no HTTP/1, or too long.
pub fn request(url: &Url, method: &str, json: Option<&str>, limit: Duration) -> io::Result<Response> {
    let deadline = Instant::now() + limit;
    let mut stream = connect(&url.place, deadline)?;
    let host = match &url.place {
        Place::Tcp(host) => host.as_str(),
        Place::Unix(_) => "localhost",
    };
    let content = json.map_or(String::new(), |j| format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{j}", j.len()));
    let end = if json.is_some() { "" } else { "\r\n" };
    let path = &url.path;
    let head =
        format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: coldspare\r\nAccept: application/json\r\nConnection: close\r\n");
    stream.limit(deadline)?;
    stream.write_all(format!("{head}{content}{end}").as_bytes())?;
    let mut bytes = Vec::new();
    let mut block = [0; 4096];
    loop {
        stream.limit(deadline)?;
        let len = match stream.read(&mut block) {
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            Err(e) => return Err(e),
        };
        bytes.extend_from_slice(&block[..len]);
        if bytes.len() > RESPONSE_BYTES_MAX {
            return Err(invalid("an answer that is too long"));
        }
        if let Some(response) = parse(&bytes, if len == 0 { Stage::Over } else { Stage::Open })? {
            return Ok(response);
        }
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Open,
    Over,
}

/// The answer, once all of it is there.
fn parse(bytes: &[u8], stage: Stage) -> io::Result<Option<Response>> {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut head = httparse::Response::new(&mut fields);
    let body = match head.parse(bytes).map_err(|_| invalid("no answer of HTTP"))? {
        httparse::Status::Complete(at) => &bytes[at..],
        httparse::Status::Partial => return Ok(None),
    };
    let status = head.code.unwrap_or_default();
    let field = |name: &str| head.headers.iter().find(|f| f.name.eq_ignore_ascii_case(name)).map(|f| f.value);
    let done = |body: &[u8]| Ok(Some(Response { status, body: body.to_vec() }));
    if field("transfer-encoding").is_some_and(|v| v.to_ascii_lowercase().ends_with(b"chunked")) {
        return Ok(dechunk(body)?.map(|body| Response { status, body }));
    }
    if let Some(len) = field("content-length") {
        let len: usize = std::str::from_utf8(len).ok().and_then(|l| l.trim().parse().ok()).ok_or_else(|| invalid("a length"))?;
        return if body.len() >= len { done(&body[..len]) } else { Ok(None) };
    }
    if stage == Stage::Over || status == 204 { done(body) } else { Ok(None) }
}

/// The content of chunks; `None` while the last one is missing.
fn dechunk(mut rest: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    loop {
        match httparse::parse_chunk_size(rest).map_err(|_| invalid("chunks"))? {
            httparse::Status::Partial => return Ok(None),
            httparse::Status::Complete((_, 0)) => return Ok(Some(body)),
            httparse::Status::Complete((at, len)) => {
                let len = usize::try_from(len).ok().filter(|len| *len <= RESPONSE_BYTES_MAX).ok_or_else(|| invalid("a chunk"))?;
                // Each chunk ends with a line's end.
                let Some(chunk) = rest.get(at..at + len + 2) else { return Ok(None) };
                body.extend_from_slice(&chunk[..len]);
                rest = &rest[at + len + 2..];
            }
        }
    }
}

enum Connection {
    Tcp(TcpStream),
    Unix(UnixStream),
}

fn connect(place: &Place, deadline: Instant) -> io::Result<Connection> {
    match place {
        Place::Unix(path) => Ok(Connection::Unix(UnixStream::connect(path)?)),
        Place::Tcp(host) => {
            let mut last = io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address"));
            for address in host.to_socket_addrs()? {
                match TcpStream::connect_timeout(&address, left(deadline)?) {
                    Ok(stream) => return Ok(Connection::Tcp(stream)),
                    Err(e) => last = e,
                }
            }
            Err(last)
        }
    }
}

impl Connection {
    /// Has the next call end by `deadline`.
    fn limit(&self, deadline: Instant) -> io::Result<()> {
        let left = Some(left(deadline)?);
        match self {
            Connection::Tcp(s) => s.set_read_timeout(left).and_then(|()| s.set_write_timeout(left)),
            Connection::Unix(s) => s.set_read_timeout(left).and_then(|()| s.set_write_timeout(left)),
        }
    }
}

impl Read for Connection {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Connection::Tcp(s) => s.read(buf),
            Connection::Unix(s) => s.read(buf),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Connection::Tcp(s) => s.write(buf),
            Connection::Unix(s) => s.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn left(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} that isn't understood"))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// Answers one request with `answer`, and leaves the connection open for `hold`.
    fn serve(answer: &'static [u8], hold: Duration) -> Url {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/status", listener.local_addr().unwrap()).parse().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request);
            let _ = stream.write_all(answer);
            thread::sleep(hold);
        });
        url
    }

    fn check(answer: &'static [u8], expected: Health) {
        assert_eq!(ask(&serve(answer, Duration::ZERO), Duration::from_secs(20)), expected);
    }

    #[test]
    fn the_json_counts_not_the_status() {
        check(b"HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n{\"state\":\"RUNNING\"}", Health::Running);
        check(b"HTTP/1.1 503 x\r\nContent-Length: 20\r\n\r\n{\"state\":\"STARTING\"}", Health::Starting);
        check(b"HTTP/1.1 200 OK\r\n\r\n{\"state\":\"MAINTENANCE\"}", Health::Maintenance);
        check(b"HTTP/1.0 200 OK\r\n\r\n{\"state\":\"FIRST_RUN\", \"more\": [1]}", Health::FirstRun);
        let chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{\"state\":\r\nA;x=y\r\n\"RUNNING\"}\r\n0\r\n\r\n";
        check(chunked, Health::Running);
        check(b"HTTP/1.1 200 OK\r\n\r\n{\"state\":\"\\u0007\"}", Health::Unknown("\\u{7}".into()));
        check(b"HTTP/1.1 200 OK\r\n\r\n<html>", Health::Failed("HTTP 200, and no JSON with a state".into()));
        check(b"HTTP/1.1 200 OK\r\n\r\n{\"state\": 7}", Health::Failed("HTTP 200, and no JSON with a state".into()));
    }

    #[test]
    fn what_hangs_or_floods_has_failed_in_time() {
        let fails = |url: &Url, what: &str| match ask(url, Duration::from_millis(300)) {
            Health::Failed(why) => assert!(why.contains(what), "{why}"),
            other => panic!("{other:?}"),
        };
        let began = Instant::now();
        fails(&serve(b"HTTP/1.1 200 OK\r\nContent-Length: 19\r\n\r\n{", Duration::from_secs(20)), "timed out");
        fails(&serve(b"", Duration::from_secs(20)), "timed out");
        fails(&serve(b"SSH-2.0-OpenSSH\r\n", Duration::ZERO), "isn't understood");
        static FLOOD: [u8; 200_000] = [b'x'; 200_000];
        fails(&serve(&FLOOD, Duration::ZERO), "isn't understood");
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        fails(&format!("http://{free}/status").parse().unwrap(), "refused");
        assert!(began.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_trickle_does_not_outlast_the_limit() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url: Url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while stream.write_all(b"H").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        let began = Instant::now();
        assert!(matches!(ask(&url, Duration::from_millis(300)), Health::Failed(_)));
        assert!(began.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn unix_sockets_answer_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 1024]);
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n{\"state\":\"RUNNING\"}").unwrap();
        });
        let url: Url = format!("unix:{}", path.display()).parse().unwrap();
        assert_eq!(ask(&url, Duration::from_secs(20)), Health::Running);
    }

    proptest::proptest! {
        #[test]
        fn no_answer_panics(head in "(HTTP/1.1 200 OK\r\n(Transfer-Encoding: chunked|Content-Length: [0-9]{1,20})\r\n\r\n)?", body: Vec<u8>) {
            let bytes = [head.as_bytes(), &body].concat();
            for stage in [Stage::Open, Stage::Over] {
                if let Ok(Some(response)) = parse(&bytes, stage) {
                    proptest::prop_assert!(response.body.len() <= bytes.len());
                    interpret(Some(response.status), &response.body);
                }
            }
        }
    }

    #[test]
    fn urls_are_checked() {
        let shown = |text: &str| text.parse::<Url>().map(|u| u.to_string());
        assert_eq!(shown("http://127.0.0.1:7990/status").unwrap(), "http://127.0.0.1:7990/status");
        assert_eq!(shown("http://host").unwrap(), "http://host:80/");
        assert_eq!(shown("http://[::1]:80/x").unwrap(), "http://[::1]:80/x");
        assert_eq!(shown("unix:/run/a:/b").unwrap(), "unix:/run/a:/b");
        for bad in ["https://host/", "http:///x", "ftp://x", "unix:rel", "http://h/a b", "http://user@h/"] {
            assert!(shown(bad).is_err(), "{bad}");
        }
    }
}
