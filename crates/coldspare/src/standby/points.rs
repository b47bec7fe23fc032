//! The points of the standby: what there is, going back to one, and on from there.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use coldspare_core::control::{Applied, Role};
use coldspare_failover::hook::{self, Hook, Leftovers};
use coldspare_standby::{Point, PointNo, StandbyError};
use serde_json::{Value, json};

use super::{Copy, Shared, lock, open_copy_alone};
use crate::config::{Config, History};
use crate::exit::{Code, Failure, Outcome};
use crate::socket::{self, Reply, Request};
use crate::state::State;

/// Between two looks whether points have to go.
const PRUNE_EVERY: Duration = Duration::from_secs(5);
/// Between two that changesets ask for.
const PRUNE_AT_MOST_EVERY: Duration = Duration::from_secs(1);

/// How long the database may take to say where it stands.
const POSITION_LIMIT: Duration = Duration::from_secs(5);
/// LIMIT: times that it is asked for one point.
const POSITION_TRIES: u32 = 3;
/// LIMIT: bytes of what it says.
const POSITION_BYTES_MAX: usize = 256;

/// What is asked of the points.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verb {
    /// List them.
    List,
    /// Bring the standby back to one.
    Rewind {
        /// As [`find`] takes it.
        to: String,
    },
    /// Take changesets again.
    Resume,
}

/// Runs `points`, `rewind` and `resume`: asks the daemon, or opens the standby when none runs.
///
/// # Errors
/// `Usage` on an active; `Differs` when there is no such point, or nothing to resume; `Damage`.
pub(crate) fn run(config_path: &Path, verb: &Verb, is_json: bool) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    let record = state.control()?;
    if record.role != Role::Standby {
        return Err(Failure::usage(format!("this host is {}; points are those of the standby", record.role.word())));
    }
    let request = match verb {
        Verb::List => Request::Points,
        Verb::Rewind { to } => Request::Rewind { to: to.clone() },
        Verb::Resume => Request::Resume,
    };
    let done = match socket::ask(&state.socket_path(), &request, None, |_| {})? {
        Some(done) => done,
        None => {
            let _lock = state.lock()?;
            let copy = open_copy_alone(&config, &state, &record)?;
            match verb {
                Verb::List => list(&copy, &config.history).map_err(Failure::damage)?,
                Verb::Rewind { to } => {
                    let to = find(&copy, to)?;
                    gone_back(&copy, to, copy.rewind(to).map_err(failure_of)?)
                }
                Verb::Resume => resumed(copy.resume())?,
            }
        }
    };
    if is_json {
        println!("{done}");
    } else {
        print!("{}", text(verb, &done));
    }
    Ok(Code::Done)
}

/// The point that a person names: by its number, `latest` for the last one that the active brought, or a time in RFC 3339
/// for the last one that is not younger.
///
/// # Errors
/// `Usage` when it is none of these; `Differs` when there is none.
pub(crate) fn find(copy: &Copy, named: &str) -> Result<PointNo, Failure> {
    let points = copy.points().map_err(Failure::damage)?;
    let found = if named == "latest" {
        points.iter().rfind(|point| !point.is_rewind)
    } else if let Ok(no) = named.parse() {
        points.iter().find(|point| point.no == PointNo(no))
    } else if let Ok(time) = named.parse::<jiff::Timestamp>() {
        let ms = u64::try_from(time.as_millisecond()).unwrap_or_default();
        points.iter().rfind(|point| !point.is_rewind && as_of_ms(point) <= ms)
    } else {
        let message = format!("{named:?} is no point: a number of `coldspare points`, latest, or a time such as 2026-01-31T12:00:00Z");
        return Err(Failure::usage(message));
    };
    found.map(|point| point.no).ok_or_else(|| Failure::refused(format!("there is no point {named}; `coldspare points` lists them")))
}

/// Of when a point is: on the active's clock, or, where only a part of what the active had came, on this host's.
fn as_of_ms(point: &Point) -> u64 {
    if point.applied.as_of_ms > 0 { point.applied.as_of_ms } else { point.at_ms }
}

fn list(copy: &Copy, limits: &History) -> Result<Value, StandbyError> {
    let points = copy.points()?;
    let last = points.last().map(|point| point.no);
    let shown: Vec<Value> = points.iter().map(|point| to_json(point, last)).collect();
    Ok(json!({"points": shown, "history": summary(&points, limits), "rewound": copy.rewound().map(|no| no.0)}))
}

fn to_json(point: &Point, last: Option<PointNo>) -> Value {
    let Point { no, applied, at_ms, changes, bytes, is_rewind, position } = point;
    let as_of_ms = Some(applied.as_of_ms).filter(|ms| *ms > 0);
    json!({
        "point": no.0,
        "seq": applied.seq.0,
        "session": applied.session.to_string(),
        "as_of": as_of_ms.map(crate::active::rfc3339),
        "as_of_ms": as_of_ms,
        "at": crate::active::rfc3339(*at_ms),
        "at_ms": at_ms,
        "changes": changes,
        "bytes": bytes,
        "rewind": is_rewind,
        "position": position,
        "current": Some(*no) == last,
    })
}

fn summary(points: &[Point], limits: &History) -> Value {
    let History { age_minutes, space_bytes, free_bytes } = limits;
    json!({
        "points": points.len(),
        "bytes": points.iter().map(|point| point.bytes).sum::<u64>(),
        "oldest": points.first().map(|point| crate::active::rfc3339(point.at_ms)),
        "age_minutes": age_minutes,
        "space_bytes": space_bytes,
        "free_bytes": free_bytes,
    })
}

/// The history as `status` shows it.
pub(super) fn status(copy: &Copy, limits: &History) -> Option<Value> {
    copy.points().ok().map(|points| summary(&points, limits))
}

fn gone_back(copy: &Copy, to: PointNo, applied: Applied) -> Value {
    let as_of = Some(applied.as_of_ms).filter(|ms| *ms > 0).map(crate::active::rfc3339);
    json!({"point": to.0, "seq": applied.seq.0, "as_of": as_of, "held": copy.rewound().is_some()})
}

fn resumed(resumed: Result<bool, StandbyError>) -> Result<Value, Failure> {
    match resumed {
        Ok(true) => Ok(json!({"resumed": true})),
        Ok(false) => Err(Failure::refused("the standby follows its active; there is nothing to resume")),
        Err(e) => Err(Failure::damage(e)),
    }
}

fn failure_of(e: StandbyError) -> Failure {
    match e {
        e @ StandbyError::UnknownPoint(_) => Failure::refused(e),
        e => Failure::damage(e),
    }
}

fn text(verb: &Verb, done: &Value) -> String {
    let word = |value: &Value| value.as_str().map_or_else(|| "-".to_string(), str::to_string);
    match verb {
        Verb::Rewind { .. } if done["held"] == true => format!(
            "the standby is at point {}, changeset {} as of {}\nit stays there: `coldspare resume` lets replication go on, \
             `coldspare rewind --to latest` takes it back\n",
            done["point"],
            done["seq"],
            word(&done["as_of"])
        ),
        Verb::Rewind { .. } => format!("the standby is at point {}, changeset {}; it follows its active\n", done["point"], done["seq"]),
        Verb::Resume => "the standby takes changesets again; the active compares everything first\n".into(),
        Verb::List => {
            let mut out = format!("{:>8} {:>10} {:<24} {:>9} {:>14}\n", "point", "changeset", "as of", "changes", "bytes");
            for p in done["points"].as_array().into_iter().flatten() {
                let as_of = if p["as_of"].is_null() { &p["at"] } else { &p["as_of"] };
                let note = match (p["current"] == true, p["rewind"] == true) {
                    (true, true) => "  now; gone back to",
                    (true, false) => "  now",
                    (false, true) => "  gone back to",
                    (false, false) => "",
                };
                let [no, seq, changes, bytes] = ["point", "seq", "changes", "bytes"].map(|name| p[name].to_string());
                let position = p["position"].as_str().map(|position| format!("  {position}")).unwrap_or_default();
                out.push_str(&format!("{no:>8} {seq:>10} {:<24} {changes:>9} {bytes:>14}{position}{note}\n", word(as_of)));
            }
            let history = &done["history"];
            let (points, bytes) = (&history["points"], &history["bytes"]);
            let (minutes, most) = (&history["age_minutes"], &history["space_bytes"]);
            out.push_str(&format!("{points} points, {bytes} bytes; kept for {minutes} minutes, at most {most} bytes\n"));
            out
        }
    }
}

/// Has the last point say where the database stands, if it doesn't yet; `failed` is a point that could not, and how often.
fn note_position(copy: &Copy, command: Vec<String>, failed: Option<(PointNo, u32)>) -> Option<(PointNo, u32)> {
    let no = copy.points().ok()?.pop().filter(|point| point.position.is_none())?.no;
    let times = failed.filter(|(of, _)| *of == no).map_or(0, |(_, times)| times);
    if times == POSITION_TRIES {
        return failed;
    }
    let why = ask_position(command).and_then(|position| copy.note_position(no, &position).map_err(|e| e.to_string())).err()?;
    tracing::warn!(error = why, "the database doesn't say where it stands");
    Some((no, times + 1))
}

fn ask_position(command: Vec<String>) -> Result<String, String> {
    let hook = Hook { command, environment: Vec::new(), limit: POSITION_LIMIT, leftovers: Leftovers::Killed };
    let ran = hook::run(&hook, &[]).map_err(|e| e.to_string())?;
    ran.check()?;
    let line = ran.output.lines().rev().map(str::trim).find(|line| !line.is_empty()).ok_or("it says nothing")?;
    let mut position = coldspare_core::path::escape(line.as_bytes());
    position.truncate(position.floor_char_boundary(POSITION_BYTES_MAX));
    Ok(position)
}

impl Shared {
    /// Lists the points.
    pub(super) async fn points(self: &Arc<Self>) -> Reply {
        let limits = self.config.history.clone();
        self.with_copy(move |copy| list(copy, &limits).map_err(Failure::damage)).await
    }

    /// Goes back to a point. Nobody is served meanwhile, and the active hears of it when it connects anew.
    pub(super) async fn rewind(self: &Arc<Self>, to: String) -> Reply {
        let _nobody_is_served = self.alone("the standby goes back to a point").await;
        let shared = self.clone();
        self.with_copy(move |copy| {
            let to = find(copy, &to)?;
            tracing::warn!(point = to.0, "a person brings the standby back to a point");
            let applied = copy.rewind(to).map_err(|e| {
                if !matches!(e, StandbyError::UnknownPoint(_) | StandbyError::NotKept { .. }) {
                    shared.note_trouble(&e);
                }
                failure_of(e)
            })?;
            // What the active said of a later tree isn't true of this one.
            shared.as_of_ms.store(applied.as_of_ms, Ordering::Relaxed);
            Ok(gone_back(copy, to, applied))
        })
        .await
    }

    /// Lets replication go on from the point that the standby was brought back to.
    pub(super) async fn resume(self: &Arc<Self>) -> Reply {
        let reply = self.with_copy(|copy| resumed(copy.resume())).await;
        if let Reply::Done(_) = reply {
            tracing::warn!("a person lets replication go on");
            self.end_conversation("a person lets replication go on");
        }
        reply
    }

    /// Does something with the copy, once it is open, on a blocking thread.
    pub(super) async fn with_copy(self: &Arc<Self>, work: impl FnOnce(&Copy) -> Result<Value, Failure> + Send + 'static) -> Reply {
        let Some(copy) = self.opened().await else {
            let why = lock(&self.trouble).clone().unwrap_or_default();
            return Reply::failed(&Failure::damage(format!("the standby isn't open: {why}")));
        };
        match tokio::task::spawn_blocking(move || work(&copy)).await {
            Ok(Ok(done)) => Reply::Done(done),
            Ok(Err(failure)) => Reply::failed(&failure),
            Err(e) => Reply::failed(&Failure::damage(e)),
        }
    }

    /// Lets points go that are beyond the limits, and asks where the database stands, beside the rest of the work.
    pub(super) async fn keep_history_short(self: Arc<Self>) {
        let mut failed = None;
        loop {
            let _asked = tokio::time::timeout(PRUNE_EVERY, self.prune.notified()).await;
            let copy = lock(&self.copy).clone();
            if let Some(copy) = copy {
                let (command, asked_of) = (self.config.database.position.clone(), copy.clone());
                if !command.is_empty() {
                    let asked = tokio::task::spawn_blocking(move || note_position(&asked_of, command, failed));
                    failed = asked.await.unwrap_or(failed);
                }
                match tokio::task::spawn_blocking(move || copy.prune_history()).await {
                    Ok(Ok(0)) => {}
                    Ok(Ok(points)) => tracing::debug!(points, "points went"),
                    Ok(Err(e)) => {
                        tracing::warn!(error = %e, "the history can't be shortened");
                        if matches!(e, StandbyError::Store { .. } | StandbyError::OutOfSpace { .. }) {
                            self.note_trouble(&e);
                        }
                    }
                    Err(e) => tracing::warn!(error = %e, "the history can't be shortened"),
                }
            }
            tokio::time::sleep(PRUNE_AT_MOST_EVERY).await;
        }
    }
}
