//! Starts `send`: session, roots, index, watch, and the state machine as the last run left it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coldspare_core::control::{ControlRecord, Role, Session};
use coldspare_core::follow::{Follow, FollowConfig};
use coldspare_core::{NodeId, SessionId};
use coldspare_os::{Disk, RealDisk};
use coldspare_scan::capture::{Capture, Certainty, HeldBack, Root};
use coldspare_scan::index::{Index, IndexError};
use coldspare_scan::watch::Watch;
use tokio::sync::mpsc;

use super::report::Tally;
use super::{Active, Mode, QUEUE};
use crate::config::{Config, WatchMode};
use crate::exit::{Failure, Outcome};
use crate::progress::Bar;
use crate::roots;
use crate::socket::{self, Call, Reply, Request};
use crate::state::State;

/// How long replication waits when the state folder has no room.
const SHORTAGE_PAUSE: Duration = Duration::from_secs(2);

/// Runs `send`.
///
/// # Errors
/// As the exit codes say: configuration, peer unreachable (`--once`), refused, index unusable.
pub(crate) fn run(config_path: &Path, mode: Mode) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    let record = state.control()?;
    if record.role != Role::Active {
        return Err(Failure::fenced(format!("this host is {}, not the active; only the active sends", record.role.word())));
    }
    let _lock = state.lock()?;
    let (record, session) = open_session(&state, record)?;
    let Some(address) = config.peer.address.clone() else {
        return Err(Failure::usage("[peer] address is missing in the configuration: the standby's host:port"));
    };
    coldspare_os::raise_open_files_limit();
    coldspare_os::openat2_works().map_err(Failure::usage)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Failure::usage)?;
    let outcome = loop {
        match runtime.block_on(follow(&config, &state, &record, session, mode, &address)) {
            Err(failure) if failure.passes && mode == Mode::Daemon => {
                tracing::error!(error = %failure, "replication waits; it is tried again");
                runtime.block_on(wait(&state, &failure))?;
            }
            outcome => break outcome,
        }
    };
    runtime.shutdown_timeout(Duration::from_secs(5));
    if outcome.is_ok() {
        let mut record = state.control()?;
        record.clean = true;
        state.set_control(&record)?;
    }
    outcome
}

/// Lets a shortage pass; whoever asks meanwhile is told.
async fn wait(state: &State, failure: &Failure) -> Result<(), Failure> {
    let mut calls = socket::listen(&state.socket_path())?;
    let over = tokio::time::sleep(SHORTAGE_PAUSE);
    tokio::pin!(over);
    loop {
        tokio::select! {
            () = &mut over => return Ok(()),
            call = calls.recv() => {
                let Some(Call { request, reply }) = call else { return Ok(()) };
                let answer = match request {
                    Request::Status => {
                        let mut status = crate::status::stopped(state)?;
                        status["trouble"] = failure.message.clone().into();
                        Reply::Done(status)
                    }
                    _ => Reply::failed(&Failure::unreachable(format!("replication waits: {failure}"))),
                };
                let _ = reply.send(answer).await;
            }
        }
    }
}

/// Follows the home until it is told to stop, or can't go on.
async fn follow(config: &Config, state: &State, record: &ControlRecord, session: Session, mode: Mode, address: &str) -> Outcome {
    let wake = Arc::new(tokio::sync::Notify::new());
    let capture = open_capture(config, state, record, mode, &wake)?;
    let (events, inbox) = mpsc::channel(QUEUE);
    let follow = new_follow(config, &capture, state, session.id)?;
    let pins = state.pins()?;
    if pins.is_empty() {
        return Err(Failure::usage("no standby is paired with this host; run `coldspare init active --invite …`"));
    }
    let active = Active {
        identity: Arc::new(state.identity()?),
        pins,
        session,
        capture: Arc::new(capture),
        follow,
        started: Instant::now(),
        mode,
        sending: None,
        peer: None,
        peer_node: known_standby(state),
        certainty: Certainty::Ask,
        must_ask: false,
        literal: BTreeSet::new(),
        told_held: None,
        give_up: Arc::default(),
        taken: None,
        waiting: BTreeMap::new(),
        next_call: 0,
        tally: Tally::default(),
        refusals: 0,
        last_trouble: None,
        as_of_ms: None,
        events,
        wake,
        bar: matches!(mode, Mode::Once { .. }).then(|| Bar::spinner("sending")),
        config: config.clone(),
        state: state.clone(),
        record: record.clone(),
    };
    active.run(address.into(), inbox).await
}

/// Continues the session, or opens a new one when something durable may be lost (R1).
fn open_session(state: &State, mut record: ControlRecord) -> Result<(ControlRecord, Session), Failure> {
    let boot = boot_id()?;
    let session = match record.session {
        Some(session) if record.continues(boot) => session,
        _ => {
            let session = Session { epoch: record.promised, id: SessionId(crate::init::random()?), opened_by: record.node };
            tracing::warn!(session = %session.id, "the host was restarted: a new session begins, everything is compared");
            session
        }
    };
    record.session = Some(session);
    record.boot = boot;
    record.clean = false;
    state.set_control(&record)?;
    Ok((record, session))
}

/// The id of the kernel's run; `COLDSPARE_BOOT_ID`, for tests, stands for a restart of the host.
fn boot_id() -> Result<[u8; 16], Failure> {
    match std::env::var("COLDSPARE_BOOT_ID") {
        Ok(text) => {
            let id = SessionId::parse(&text);
            id.map(|id| id.0).ok_or_else(|| Failure::usage("COLDSPARE_BOOT_ID isn't 32 hexadecimal digits; unset it"))
        }
        Err(_) => coldspare_os::boot_id().map_err(|e| Failure::usage(format!("the boot id can't be read: {e}"))),
    }
}

fn open_capture(
    config: &Config,
    state: &State,
    record: &ControlRecord,
    mode: Mode,
    wake: &Arc<tokio::sync::Notify>,
) -> Result<Capture<RealDisk>, Failure> {
    let paths = roots::resolve(config, record.cluster)?;
    let disk = RealDisk::crossing();
    let mut opened = Vec::new();
    for (root, path) in config.roots.iter().zip(&paths) {
        let dir = disk.open_root(path).map_err(|e| Failure::usage(format!("root {:?}: {}: {e}", root.name, path.display())))?;
        opened.push(Root { path: path.clone(), dir, exclude: root.exclude().map_err(Failure::usage)? });
    }
    let in_use = |e| match e {
        // By what is left of the last try.
        IndexError::InUse { .. } => Failure { passes: true, ..Failure::usage(e) },
        e => super::index_failure(e),
    };
    state.make_store(&state.index_path(), Index::open)?;
    let index = Index::open(&state.index_path()).map_err(in_use)?;
    let watch = match (mode, config.send.watch) {
        (Mode::Once { .. }, _) | (_, WatchMode::Scan) => None,
        (Mode::Daemon, wanted) => {
            for path in &paths {
                coldspare_scan::watch::make_cookie_dir(path).map_err(|e| Failure::usage(format!("{}: {e}", path.display())))?;
            }
            let wake = wake.clone();
            match Watch::start(paths, Box::new(move || wake.notify_one())) {
                Ok(watch) => Some(watch),
                Err(e) if wanted == WatchMode::Auto => {
                    tracing::warn!(error = %e, "no watch: changes are found by scans only");
                    None
                }
                Err(e) => return Err(Failure::usage(e)),
            }
        }
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(config.send.threads).thread_name(|n| format!("capture-{n}")).build();
    let pool = pool.map_err(Failure::usage)?;
    Ok(Capture { disk, roots: opened, index, watch, held: HeldBack::default(), pool, zstd_level: config.send.compression_level })
}

fn new_follow(config: &Config, capture: &Capture<RealDisk>, state: &State, session: SessionId) -> Result<Follow, Failure> {
    let acked = match known_standby(state) {
        Some(node) => capture.index.acked(node).map_err(Failure::damage)?,
        None => None,
    };
    let follow = FollowConfig {
        session,
        next_seq: capture.index.next_seq().map_err(Failure::damage)?,
        acked,
        full_scan_every: Duration::from_secs(match capture.watch {
            Some(_) => config.send.full_scan_seconds,
            None => config.send.uncovered_scan_seconds,
        }),
        retry_min: Duration::from_millis(200),
        retry_max: Duration::from_secs(5),
    };
    Ok(Follow::new(follow, Duration::ZERO))
}

/// The node id of the standby, as of the last contact.
fn known_standby(state: &State) -> Option<NodeId> {
    NodeId::parse(std::fs::read_to_string(state.note_path("standby")).ok()?.trim())
}
