//! What stands in for Bitbucket where clients clone and push: git's own CGI program behind HTTP, and a status page.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};

/// The server's settings, from its environment: `ADDRESS:PORT FOLDER-OF-REPOSITORIES`.
const SERVER: &str = "COLDSPARE_GIT_SERVER";

/// The shell command that starts it, for the repositories in `folder`.
pub(crate) fn command(address: &str, folder: &Path) -> String {
    let me = std::env::current_exe().unwrap();
    format!("env {SERVER}='{address} {}' {me:?} --ignored --exact git_server::server", folder.display())
}

/// The server itself: this test binary, started by a script.
#[test]
#[ignore = "not a test: the server that stands in for Bitbucket"]
fn server() {
    let Ok(settings) = std::env::var(SERVER) else { return };
    let (address, folder) = settings.split_once(' ').unwrap();
    for stream in TcpListener::bind(address).unwrap().incoming().flatten() {
        let folder = folder.to_string();
        // A client that goes away ends its own thread.
        std::thread::spawn(move || answer(stream, &folder));
    }
}

struct Request {
    method: String,
    path: String,
    query: String,
    fields: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Request {
    fn read(stream: &TcpStream) -> Option<Request> {
        let mut reader = BufReader::new(stream);
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let mut words = line.split_ascii_whitespace();
        let (method, target) = (words.next()?.to_string(), words.next()?.to_string());
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let mut fields = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            let Some((name, value)) = line.split_once(':') else { break };
            fields.push((name.to_ascii_lowercase(), value.trim().to_string()));
        }
        let mut request = Request { method, path: path.into(), query: query.into(), fields, body: Vec::new() };
        // A body without a length isn't taken: clients have a post buffer that is large enough.
        request.body = vec![0; request.field("content-length").parse().unwrap_or(0)];
        reader.read_exact(&mut request.body).ok()?;
        Some(request)
    }

    fn field(&self, name: &str) -> &str {
        self.fields.iter().find(|(n, _)| n == name).map_or("", |(_, value)| value)
    }
}

fn answer(mut stream: TcpStream, folder: &str) -> Option<()> {
    let request = Request::read(&stream)?;
    if request.path == "/status" {
        return reply(&mut stream, "200 OK", "", b"{\"state\":\"RUNNING\"}");
    }
    let mut command = Command::new("git");
    command.arg("http-backend").current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.env("GIT_PROJECT_ROOT", folder).env("GIT_HTTP_EXPORT_ALL", "1").env("REMOTE_USER", "somebody");
    command.env("REQUEST_METHOD", &request.method).env("PATH_INFO", &request.path).env("QUERY_STRING", &request.query);
    command.env("CONTENT_TYPE", request.field("content-type")).env("CONTENT_LENGTH", request.body.len().to_string());
    command.env("HTTP_CONTENT_ENCODING", request.field("content-encoding")).env("GIT_PROTOCOL", request.field("git-protocol"));
    let mut backend = command.spawn().ok()?;
    let (mut stdin, body) = (backend.stdin.take()?, request.body);
    let writer = std::thread::spawn(move || stdin.write_all(&body));
    let output = backend.wait_with_output().ok()?.stdout;
    let _ = writer.join();
    let end = output.windows(4).position(|w| w == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&output[..end]).into_owned();
    let (status, fields): (Vec<&str>, Vec<&str>) = head.split("\r\n").partition(|line| line.starts_with("Status: "));
    let status = status.first().map_or("200 OK", |line| &line["Status: ".len()..]);
    reply(&mut stream, status, &(fields.join("\r\n") + "\r\n"), &output[end + 4..])
}

fn reply(stream: &mut TcpStream, status: &str, fields: &str, body: &[u8]) -> Option<()> {
    write!(stream, "HTTP/1.1 {status}\r\n{fields}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len()).ok()?;
    stream.write_all(body).ok()
}
