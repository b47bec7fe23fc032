//! Giving the active's role over (R7): the commands, and what a host does that gave it and waits for the other to take it.
//!
//! What it gave is stored before it is said, and said again at each connection until it is taken: a crash of either host at
//! any moment leaves a handover that goes on by itself.

use std::path::Path;
use std::time::{Duration, Instant};

use coldspare_core::control::{ControlRecord, Effect, Event, Handover, Refusal, Role, Taking};
use coldspare_transport::{LinkError, ToActive, ToStandby};
use serde_json::{Value, json};

use crate::active::{ConnectError, greet_standby, peer_address};
use crate::config::Config;
use crate::exit::{Code, Failure, Outcome};
use crate::role::{self, NotTaken};
use crate::socket::{self, Call, Reply, Request};
use crate::state::State;

/// Between two looks at the control record.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What the daemon takes to say that time is over.
const ANSWER_MARGIN: Duration = Duration::from_secs(10);
/// Between two tries to reach the standby.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// How long the standby may take to compare its tree.
const ANSWER_LIMIT: Duration = Duration::from_secs(600);

/// Runs `switchover` ([`Taking::Now`]) or `demote` ([`Taking::WhenPromoted`]).
///
/// # Errors
/// What the daemon says; `Unreachable` when none runs or time is over, in which case the handover goes on by itself;
/// `Fenced` for a switchover of a host that isn't the active.
pub(crate) fn run(config_path: &Path, taking: Taking, accept_held_back: bool, timeout: Duration, json: bool) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    let deadline = Instant::now() + timeout;
    let started = Instant::now();
    let record = state.control()?;
    match record.role {
        Role::Active => {
            let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            let request = Request::HandOver { taking, accept_held_back, timeout_ms };
            // The daemon's answer to a time that is over comes after it.
            if socket::ask(&state.socket_path(), &request, Some(timeout + ANSWER_MARGIN), |_| ())?.is_none() {
                return Err(Failure::unreachable("no daemon runs here; start `coldspare run`, which sends the rest and hands over"));
            }
        }
        // Nothing that waits for the other host: it is here that it becomes a standby.
        Role::Fenced if taking == Taking::WhenPromoted => crate::demotion::demote(&config, &state)?,
        Role::Fenced => return Err(crate::serve::wrong_role(&record, crate::serve::Serves::Active)),
        Role::Handover | Role::Standby => {}
    }
    let record = loop {
        let record = state.control()?;
        let is_done = match taking {
            Taking::Now => record.role == Role::Standby,
            Taking::WhenPromoted => record.role == Role::Standby || is_noted(&state),
        };
        if is_done {
            break record;
        }
        if Instant::now() > deadline {
            let next = "it goes on as long as `coldspare run` runs here. If the standby is lost for good, make sure that it is off; then \
                        `coldspare promote --accept-possible-loss` makes this host the active again";
            return Err(Failure::unreachable(format!("the standby did not answer the handover in time; {next}")));
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let done = json!({
        "role": record.role.word(),
        "epoch": record.promised.0,
        "seq": record.handover.map(|h| h.place.seq.0),
        "seconds": (started.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
    });
    match (json, record.role) {
        (true, _) => println!("{done}"),
        (false, Role::Handover) => println!("handed over at changeset {}: `coldspare promote` on the standby takes it", done["seq"]),
        (false, _) => println!("this host is a standby, epoch {}; {} seconds", done["epoch"], done["seconds"]),
    }
    Ok(Code::Done)
}

/// Whether the standby noted what this host gave.
fn is_noted(state: &State) -> bool {
    let status = socket::ask(&state.socket_path(), &Request::Status, Some(Duration::from_secs(5)), |_| ());
    matches!(status, Ok(Some(status)) if status["handover"] == "noted")
}

/// Offers what this host gave until the standby took it; then this host is fenced.
///
/// # Errors
/// `Fenced`: the other host refuses for good; `Usage`, `Damage`.
pub(crate) fn give(config: &Config, state: &State) -> Result<(), Failure> {
    let _lock = state.lock()?;
    let (record, effects) = role::take(config, state, &state.control()?, Event::Started(role::fresh()?)).map_err(NotTaken::into_failure)?;
    let offer = effects.into_iter().find_map(|effect| if let Effect::Offer(handover) = effect { Some(handover) } else { None });
    let Some(offer) = offer else { return Ok(()) };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Failure::usage)?;
    let given = runtime.block_on(offer_until_taken(config, state, record, offer));
    runtime.shutdown_timeout(Duration::from_secs(5));
    given
}

/// What the status says meanwhile.
struct Standing {
    is_noted: bool,
    trouble: Option<String>,
}

async fn offer_until_taken(config: &Config, state: &State, record: ControlRecord, offer: Handover) -> Result<(), Failure> {
    let mut calls = socket::listen(&state.socket_path())?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(Failure::usage)?;
    tracing::warn!(seq = offer.place.seq.0, "this host gave the active's role over; it is offered until the standby took it");
    eprintln!("ready");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let standing = std::sync::Mutex::new(Standing { is_noted: false, trouble: None });
    let lock = || standing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let offering = async {
        loop {
            match offer_once(config, state, &record, offer, || lock().is_noted = true).await {
                Ok(event) => return role::take(config, state, &record, event).map(drop).map_err(NotTaken::into_failure),
                Err(Unanswered::ForGood(failure)) => return Err(failure),
                Err(Unanswered::Yet(why)) => {
                    if lock().trouble.as_deref() != Some(&why) {
                        tracing::warn!(why, "the handover is not taken yet; it is tried again");
                        lock().trouble = Some(why);
                    }
                    tokio::time::sleep(RETRY_EVERY).await;
                }
            }
        }
    };
    tokio::pin!(offering);
    loop {
        tokio::select! {
            taken = &mut offering => return taken,
            call = calls.recv() => if let Some(Call { request, reply }) = call {
                let answer = match request {
                    Request::Status => Reply::Done(status(state, &lock())?),
                    _ => Reply::failed(&Failure::fenced("this host gave the active's role over, and waits until the standby took it")),
                };
                let _ = reply.send(answer).await;
            },
            _ = terminate.recv() => { crate::serve::stop(); return Ok(()) }
            _ = tokio::signal::ctrl_c() => { crate::serve::stop(); return Ok(()) }
        }
    }
}

fn status(state: &State, standing: &Standing) -> Result<Value, Failure> {
    let mut status = crate::status::stopped(state)?;
    status["handover"] = json!(if standing.is_noted { "noted" } else { "offered" });
    status["trouble"] = json!(standing.trouble);
    Ok(status)
}

enum Unanswered {
    /// It may be taken at another try.
    Yet(String),
    ForGood(Failure),
}

/// Offers it at one connection, as long as that lasts.
async fn offer_once(
    config: &Config,
    state: &State,
    record: &ControlRecord,
    offer: Handover,
    noted: impl Fn(),
) -> Result<Event, Unanswered> {
    let yet = |e: LinkError| Unanswered::Yet(e.to_string());
    let address = peer_address(config, state).map_err(Unanswered::ForGood)?;
    let (link, mut sender, mut receiver) = match greet_standby(config, state, record, &address).await {
        Ok(greeted) => greeted,
        Err(ConnectError::Refused(Refusal::Epoch { promised, .. })) => return Ok(Event::Outranked { promised }),
        Err(ConnectError::Refused(refusal)) => return Err(Unanswered::Yet(refusal.to_string())),
        Err(ConnectError::Link(e)) => return Err(yet(e)),
    };
    sender.send(&ToStandby::Handover { handover: offer, taking: taking_of(state) }).await.map_err(yet)?;
    loop {
        let next = tokio::time::timeout(ANSWER_LIMIT, receiver.next()).await;
        let next = next.map_err(|_| Unanswered::Yet("the standby does not answer".into()))?;
        match next.map_err(yet)? {
            ToActive::Taken { session } => {
                link.close("the handover is taken");
                return Ok(Event::Taken { session });
            }
            ToActive::Noted => noted(),
            ToActive::NotTaken(refusal) => {
                link.close("the handover is not taken");
                return Err(Unanswered::Yet(refusal.to_string()));
            }
            _ => {}
        }
    }
}

/// When the standby is to take it: what the command said is kept beside the record.
fn taking_of(state: &State) -> Taking {
    if state.note("taking").as_deref() == Some("when promoted") { Taking::WhenPromoted } else { Taking::Now }
}

/// Keeps when the standby is to take what is about to be given.
///
/// # Errors
/// `Damage`.
pub(crate) fn note_taking(state: &State, taking: Taking) -> Result<(), Failure> {
    let text = match taking {
        Taking::Now => "now",
        Taking::WhenPromoted => "when promoted",
    };
    state.replace("taking", text.as_bytes())
}
