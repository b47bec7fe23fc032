//! `health`: what load balancers and keepalived are told of this host.
//!
//! The role is read from the control record, and the roots' markers are looked at, at each question; what the guard says,
//! if one runs, is asked for. Nothing is remembered: an answer is never older than its question.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use coldspare_failover::answer::Answer;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::Config;
use crate::exit::{Code, Failure, Outcome};
use crate::guard;
use crate::roots;
use crate::state::State;

/// LIMIT: connections, and looks at roots that may hang, at a time; more wait.
const CONNECTIONS_MAX: usize = 64;
/// LIMIT: bytes of a request.
const REQUEST_BYTES_MAX: usize = 8 << 10;
/// How long a connection may take, from its first byte to its last.
const LIMIT: Duration = Duration::from_secs(5);

/// How `health` runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Until it is stopped.
    Daemon,
    /// Prints one answer.
    Once,
}

/// Runs `health`; once: exit code 0 if requests may be sent here, else 1.
///
/// # Errors
/// `Usage`: configuration, no node, or a port is taken.
pub(crate) fn run(config_path: &Path, mode: Mode) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    state.control()?;
    if mode == Mode::Once {
        let answer = answer(&config, &state);
        println!("{}", if answer == Answer::Up { "up" } else { answer.reason() });
        return Ok(if answer == Answer::Up { Code::Done } else { Code::Differs });
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Failure::usage)?;
    let outcome = runtime.block_on(serve(config, state));
    runtime.shutdown_background();
    outcome
}

async fn serve(config: Config, state: State) -> Outcome {
    let http = bind(config.health.listen).await?;
    let agent = bind(config.health.agent_listen).await?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(Failure::usage)?;
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let host = Arc::new((config, state));
    eprintln!("ready");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    loop {
        let slot = slots.clone().acquire_owned().await.map_err(Failure::usage)?;
        let (accepted, is_agent) = tokio::select! {
            accepted = http.accept() => (accepted, false),
            accepted = agent.accept() => (accepted, true),
            _ = terminate.recv() => return Ok(Code::Done),
            _ = tokio::signal::ctrl_c() => return Ok(Code::Done),
        };
        match accepted {
            Ok((stream, _)) => {
                let asked = Asked { host: host.clone(), _slot: Arc::new(slot) };
                tokio::spawn(async move {
                    let talk = async { if is_agent { tell_agent(stream, asked).await } else { answer_http(stream, asked).await } };
                    // Who hangs up, or is slow, asked in vain.
                    let _ = tokio::time::timeout(LIMIT, talk).await;
                });
            }
            Err(e) => {
                tracing::warn!(error = %e, "a connection could not be taken");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    TcpListener::bind(address)
        .await
        .map_err(|e| Failure::usage(format!("the health endpoint {address}: {e}; set [health] listen, agent_listen")))
}

async fn answer_http(mut stream: TcpStream, asked: Asked) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    let method = loop {
        let mut fields = [httparse::EMPTY_HEADER; 64];
        let mut request = httparse::Request::new(&mut fields);
        match request.parse(&bytes) {
            Ok(httparse::Status::Complete(_)) => break request.method.unwrap_or_default().to_string(),
            Ok(httparse::Status::Partial) if bytes.len() < REQUEST_BYTES_MAX => {}
            _ => return reply(&mut stream, "400 Bad Request", "", Content::Whole).await,
        }
        let mut block = [0; 1024];
        match stream.read(&mut block).await? {
            0 => return Ok(()),
            len => bytes.extend_from_slice(&block[..len]),
        }
    };
    let content = match method.as_str() {
        "GET" | "OPTIONS" => Content::Whole,
        "HEAD" => Content::Left,
        _ => return reply(&mut stream, "405 Method Not Allowed", "", Content::Whole).await,
    };
    let answer = look(asked).await;
    let line = if answer.status() == 200 { "200 OK" } else { "503 Service Unavailable" };
    let body = json!({"up": answer == Answer::Up, "reason": answer.reason()}).to_string() + "\n";
    reply(&mut stream, line, &body, content).await
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Whole,
    Left,
}

async fn reply(stream: &mut TcpStream, line: &str, body: &str, content: Content) -> std::io::Result<()> {
    let len = body.len();
    let head = format!(
        "HTTP/1.1 {line}\r\nContent-Type: application/json\r\nContent-Length: {len}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    if content == Content::Whole {
        stream.write_all(body.as_bytes()).await?;
    }
    stream.shutdown().await
}

async fn tell_agent(mut stream: TcpStream, asked: Asked) -> std::io::Result<()> {
    stream.write_all(look(asked).await.agent_line().as_bytes()).await?;
    stream.shutdown().await
}

/// One question, and the slot that it takes until it is answered, whether or not somebody still listens.
#[derive(Clone)]
struct Asked {
    host: Arc<(Config, State)>,
    _slot: Arc<OwnedSemaphorePermit>,
}

async fn look(asked: Asked) -> Answer {
    let looked = tokio::task::spawn_blocking(move || answer(&asked.host.0, &asked.host.1)).await;
    looked.unwrap_or_else(|e| Answer::Down(e.to_string()))
}

fn answer(config: &Config, state: &State) -> Answer {
    let record = match state.control() {
        Ok(record) => record,
        Err(failure) => return Answer::Down(failure.message),
    };
    let report = guard::ask(state);
    let answer = Answer::of(record.role, report.as_ref().map(|r| r["state"].as_str().unwrap_or("silent")));
    // An application whose home isn't there serves nothing, whatever it says.
    match roots::missing(config, record.cluster) {
        Some(root) if answer == Answer::Up => Answer::Down(format!("the root {root:?} isn't there; is its filesystem mounted?")),
        _ => answer,
    }
}
