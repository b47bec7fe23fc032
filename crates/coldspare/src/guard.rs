//! The guard's daemon: performs what `coldspare_failover::ladder` decides.
//!
//! One task owns the ladder and takes one event at a time; looking and acting run beside it and report back as events. No
//! policy here. Before each action the control record is read again: who isn't the active acts no more.

mod news;
mod report;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use coldspare_core::control::Role;
use coldspare_failover::ladder::{Action, Duty, Effect, Input, Ladder, Memory, Outcome as Answer};
use coldspare_failover::observation::{DiskState, Health, Observation, Process};
use serde_json::json;
use tokio::sync::mpsc;

use crate::application::Application;
use crate::exit::{Code, Failure, Outcome};
use crate::socket::{self, Call, Reply, Request};
use crate::state::State;
use news::Herald;
pub(crate) use report::{ask, pause, refuse_beside_guard, resume, status};

/// LIMIT: events that wait.
const QUEUE: usize = 16;
/// How long a proof of death may take to read `/proc`.
const PROVE_LIMIT: Duration = Duration::from_secs(20);
/// What a look may take beyond the limits of its parts; then it counts as one that failed.
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// LIMIT: looks that hang in the kernel; with so many nobody looks any more, and each look has failed.
const HUNG_LOOKS_MAX: usize = 8;
/// The note in the state folder that pauses the guard.
const PAUSED_NOTE: &str = "guard-paused";
/// The note that keeps the ladder's memory.
const MEMORY_NOTE: &str = "guard.json";

enum Event {
    Looked(Box<Observation>),
    Ended { id: u64, outcome: Answer },
}

struct GuardDaemon {
    application: Arc<Application>,
    ladder: Ladder,
    started: Instant,
    herald: Herald,
    events: mpsc::Sender<Event>,
    is_looking: bool,
    /// Looks that have begun and not ended.
    hung_looks: Arc<AtomicUsize>,
    look_at: Instant,
    duty: Duty,
    looks: u64,
    last_look: Option<(Instant, Health)>,
    acting: Option<(Action, Instant)>,
    last_action: Option<(Action, Answer)>,
}

/// Runs `guard` until it is stopped.
///
/// # Errors
/// `Usage`: configuration, no node, or another guard runs.
pub(crate) fn run(config_path: &Path) -> Outcome {
    let application = Arc::new(Application::load(config_path)?);
    let state = application.state().clone();
    state.control()?;
    let _lock = state.lock_guard()?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().map_err(Failure::usage)?;
    let outcome = runtime.block_on(guard(application));
    // Somebody who hangs in the kernel is not waited for.
    runtime.shutdown_background();
    outcome
}

async fn guard(application: Arc<Application>) -> Outcome {
    let (events, mut inbox) = mpsc::channel(QUEUE);
    let state = application.state().clone();
    let mut calls = socket::listen(&state.guard_socket_path())?;
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(Failure::usage)?;
    let mut daemon = GuardDaemon {
        ladder: Ladder::new(application.guard().limits(), load_memory(&state)),
        started: Instant::now(),
        herald: Herald::start(application.clone()),
        events,
        is_looking: false,
        hung_looks: Arc::default(),
        look_at: Instant::now(),
        duty: Duty::Inactive,
        looks: 0,
        last_look: None,
        acting: None,
        last_action: None,
        application,
    };
    eprintln!("ready");
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let mut is_stopping = false;
    loop {
        if is_stopping && daemon.acting.is_none() {
            return Ok(Code::Done);
        }
        let timeout = daemon.next_timeout();
        tokio::select! {
            event = inbox.recv() => match event {
                Some(event) => daemon.take(event),
                None => return Ok(Code::Done),
            },
            call = calls.recv() => if let Some(call) = call { daemon.answer(call).await },
            () = tokio::time::sleep(timeout) => daemon.time_passed(),
            // What is under way has a limit of time; a second signal ends us at once.
            _ = terminate.recv() => if std::mem::replace(&mut is_stopping, true) { return Ok(Code::Done) },
            _ = tokio::signal::ctrl_c() => if std::mem::replace(&mut is_stopping, true) { return Ok(Code::Done) },
        }
        if is_stopping {
            continue; // nothing new is begun
        }
        daemon.perform();
    }
}

impl GuardDaemon {
    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn input(&mut self, input: Input) {
        let now = self.now();
        self.ladder.handle(now, input);
    }

    fn next_timeout(&self) -> Duration {
        let ladder = self.ladder.poll_timeout().map(|at| at.saturating_sub(self.now()));
        let look = (!self.is_looking).then(|| self.look_at.saturating_duration_since(Instant::now()));
        ladder.into_iter().chain(look).min().unwrap_or(Duration::from_secs(1))
    }

    fn time_passed(&mut self) {
        self.input(Input::Tick);
        if self.is_looking || Instant::now() < self.look_at {
            return;
        }
        self.look_at = Instant::now() + Duration::from_secs(self.application.guard().check_seconds);
        self.looks += 1;
        self.read_duty();
        if self.duty != Duty::Active {
            self.last_look = None;
            return;
        }
        self.is_looking = true;
        let (application, events, began) = (self.application.clone(), self.events.clone(), self.now());
        let hung = self.hung_looks.clone();
        tokio::spawn(async move {
            let limit =
                LOOK_LIMIT + Duration::from_secs(2 * application.guard().status_timeout_seconds + application.guard().check_seconds);
            let failed =
                |why: &str| Observation { began, health: Health::Failed(why.into()), process: Process::Unknown, disk: DiskState::Good };
            let observation = if hung.load(Ordering::Relaxed) >= HUNG_LOOKS_MAX {
                failed("whoever looks hangs")
            } else {
                hung.fetch_add(1, Ordering::Relaxed);
                let work = tokio::task::spawn_blocking(move || {
                    let observation = application.observe(began);
                    hung.fetch_sub(1, Ordering::Relaxed);
                    observation
                });
                match tokio::time::timeout(limit, work).await {
                    Ok(Ok(observation)) => observation,
                    Ok(Err(e)) => failed(&e.to_string()),
                    Err(_) => failed("no look came to an end in time"),
                }
            };
            let _ = events.send(Event::Looked(Box::new(observation))).await;
        });
    }

    fn read_duty(&mut self) {
        let state = self.application.state();
        let duty = match state.control() {
            _ if state.note_path(PAUSED_NOTE).exists() => Duty::Paused,
            Ok(record) if record.role == Role::Active => Duty::Active,
            Ok(_) => Duty::Inactive,
            Err(e) => {
                tracing::error!(error = %e, "nothing is done while the control record can't be read");
                Duty::Unknown
            }
        };
        if duty != self.duty {
            tracing::info!(duty = ?duty, "whether to guard");
            self.duty = duty;
        }
        self.input(Input::Duty(duty));
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Looked(observation) => {
                self.is_looking = false;
                self.last_look = Some((Instant::now(), observation.health.clone()));
                self.input(Input::Observed(*observation));
            }
            Event::Ended { id, outcome } => {
                if let Some((action, began)) = self.acting.take() {
                    tracing::info!(action = ?action, outcome = ?outcome, seconds = began.elapsed().as_secs_f64(), "done");
                    self.last_action = Some((action, outcome.clone()));
                }
                self.input(Input::Ended { id, outcome });
            }
        }
    }

    /// Does what the ladder decided.
    fn perform(&mut self) {
        while let Some(effect) = self.ladder.poll_effect() {
            match effect {
                Effect::Act { id, action } => self.act(id, action),
                Effect::Remember(memory) => self.remember(memory),
                Effect::Tell(news) => self.herald.tell(news),
            }
        }
    }

    fn act(&mut self, id: u64, action: Action) {
        // RACE: the role may change after this and before the command begins: the commands are such that a host that
        // was just fenced may run them.
        self.read_duty();
        if self.duty != Duty::Active {
            return self.input(Input::Ended { id, outcome: Answer::Failed("this host isn't to be guarded any more".into()) });
        }
        tracing::info!(action = ?action, "begins");
        self.acting = Some((action, Instant::now()));
        let mut variables = vec![("COLDSPARE_ATTEMPTS".to_string(), self.ladder.memory().attempts.to_string())];
        if let Action::Failover { proven_dead } = action {
            variables.push(("COLDSPARE_PROVEN_DEAD".into(), if proven_dead { "yes" } else { "no" }.into()));
        }
        let (application, events) = (self.application.clone(), self.events.clone());
        tokio::spawn(async move {
            let work = tokio::task::spawn_blocking(move || application.perform(action, &variables));
            let outcome = match action {
                Action::Prove => match tokio::time::timeout(PROVE_LIMIT, work).await {
                    Ok(outcome) => outcome,
                    Err(_) => Ok(Answer::Failed("/proc could not be read in time: a process hangs in the kernel".into())),
                },
                _ => work.await,
            };
            let outcome = outcome.unwrap_or_else(|e| Answer::Failed(e.to_string()));
            let _ = events.send(Event::Ended { id, outcome }).await;
        });
    }

    fn remember(&self, memory: Memory) {
        let text = json!({"attempts": memory.attempts, "escalated": memory.escalated}).to_string();
        // A disk that takes no writes is a reason to hand over, not to stay.
        if let Err(e) = self.application.state().replace(MEMORY_NOTE, text.as_bytes()) {
            tracing::error!(error = %e, "what the guard did could not be noted; after a restart it may do it again");
        }
    }

    async fn answer(&mut self, call: Call) {
        let reply = match call.request {
            Request::Status => {
                // Who has just paused it, or changed the role, goes on by the answer.
                self.read_duty();
                Reply::Done(self.report())
            }
            _ => Reply::failed(&Failure::usage("the guard answers status only")),
        };
        let _ = call.reply.send(reply).await;
    }
}

fn load_memory(state: &State) -> Memory {
    let Ok(bytes) = std::fs::read(state.note_path(MEMORY_NOTE)) else { return Memory::default() };
    let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let attempts = value["attempts"].as_u64().and_then(|n| u32::try_from(n).ok()).unwrap_or_default();
    Memory { attempts, escalated: value["escalated"].as_bool().unwrap_or_default() }
}
