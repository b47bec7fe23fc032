//! `status` and `checkpoint`: questions to the daemon of this host.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::active::summary_line;
use crate::config::Config;
use crate::exit::{Code, Failure, Outcome};
use crate::socket::{self, Request};
use crate::state::State;

/// How long a daemon may take to say where it stands.
const STATUS_LIMIT: Duration = Duration::from_secs(10);
/// Between two looks of `--watch`.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// Runs `status`.
///
/// # Errors
/// `Usage`; `Unreachable` when no daemon runs.
pub(crate) fn status(config_path: &Path, json: bool, watch: bool) -> Outcome {
    let state = State::at(&Config::load(config_path)?.state);
    loop {
        let (mut value, code) = match socket::ask(&state.socket_path(), &Request::Status, Some(STATUS_LIMIT), |_| ()) {
            Ok(Some(value)) => (value, Code::Done),
            Ok(None) => (stopped(&state)?, Code::Unreachable),
            // One that ends, or takes another role, at this moment.
            Err(failure) if failure.code == Code::Unreachable => {
                let mut value = stopped(&state)?;
                value["trouble"] = failure.message.into();
                (value, Code::Unreachable)
            }
            Err(failure) => return Err(failure),
        };
        value["promote_hook"] = serde_json::json!(crate::promotion::steps::hook_state(&state));
        if value["role"] == "active" {
            let epoch = value["epoch"].as_u64().unwrap_or_default();
            value["promotion"] = crate::promotion::noted(&state, coldspare_core::Epoch(epoch)).unwrap_or_default();
        }
        value["guard"] = crate::guard::ask(&state).unwrap_or_default();
        if json {
            println!("{value}");
        } else {
            print!("{}", page(&value));
        }
        if !watch {
            return Ok(code);
        }
        std::thread::sleep(WATCH_EVERY);
    }
}

/// Runs `checkpoint`.
///
/// # Errors
/// `Unreachable` when no daemon runs or time runs out; what the daemon says.
pub(crate) fn checkpoint(config_path: &Path, timeout: Duration, json: bool) -> Outcome {
    let state = State::at(&Config::load(config_path)?.state);
    let request = Request::Checkpoint { timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX / 2) };
    let answer = socket::ask(&state.socket_path(), &request, Some(timeout + Duration::from_secs(5)), |_| ())?;
    let Some(done) = answer else {
        return Err(Failure::unreachable("no daemon runs here; start `coldspare send`"));
    };
    if json {
        println!("{done}");
    } else {
        println!("{}", summary_line(&done));
    }
    let held = done["held_back"].as_array().map_or(&[][..], Vec::as_slice);
    crate::active::print_held_back(held, 0);
    // What is held back is not on the standby: the promise of a checkpoint is not kept for it.
    Ok(if held.is_empty() { Code::Done } else { Code::Differs })
}

/// How many repositories a person is shown with their lag.
const LAGGING_SHOWN_MAX: usize = 5;

/// What can be said while no daemon runs.
pub(crate) fn stopped(state: &State) -> Result<Value, Failure> {
    let record = state.control()?;
    Ok(json!({
        "role": record.role.word(),
        "epoch": record.promised.0,
        "session": record.session().map(|s| s.id.to_string()),
        "seq": null,
        "as_of": null,
        "lag_ms": null,
        "connected": false,
        "watch": {"backend": "none", "coverage": 0.0},
        "held_back": [],
        "waiting_for_decision": null,
        "trouble": "no daemon runs on this host",
        "build": crate::BUILD,
    }))
}

fn page(value: &Value) -> String {
    let mut out = String::new();
    let mut line = |key: &str, text: String| out.push_str(&format!("{key:<14}{text}\n"));
    let text = |value: &Value| match value {
        Value::Null => "-".to_string(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    };
    line("role", text(&value["role"]));
    line("epoch", text(&value["epoch"]));
    line("changeset", text(&value["seq"]));
    line("consistent", format!("as of {}", text(&value["as_of"])));
    let seconds = |ms: &Value| ms.as_u64().map_or("unknown".into(), |ms| format!("{:.3} s", ms as f64 / 1000.0));
    line("lag", seconds(&value["lag_ms"]));
    for repository in value["lag_by_repository"].as_array().into_iter().flatten().take(LAGGING_SHOWN_MAX) {
        line("", format!("{} {}", seconds(&repository["lag_ms"]), text(&repository["path"])));
    }
    let more = value["lagging_repositories"].as_u64().unwrap_or_default().saturating_sub(LAGGING_SHOWN_MAX as u64);
    if more > 0 {
        line("", format!("{more} more repositories"));
    }
    let peer = &value["peer"]["address"];
    line("connected", if value["connected"] == true { format!("yes, {}", text(peer)) } else { "no".into() });
    if let Some(limit) = value["link"]["bytes_per_second_max"].as_u64() {
        line("limit", format!("{:.2} MB/s", limit as f64 / 1e6));
    }
    let watch = &value["watch"];
    if watch["watched"].is_u64() {
        let share = watch["coverage"].as_f64().unwrap_or_default() * 100.0;
        let missed = watch["missed"].as_u64().map(|missed| format!(", {missed} missed")).unwrap_or_default();
        line(
            "watch",
            format!(
                "{}, {share:.1} % covered ({} {}, {} not), {} overflows{missed}",
                text(&watch["backend"]),
                watch["watched"],
                if watch["backend"] == "fanotify" { "filesystems" } else { "folders" },
                watch["unwatched"],
                watch["overflows"],
            ),
        );
        if watch["why"].is_string() {
            line("", text(&watch["why"]));
        }
    }
    if let Some(hook) = value["promote_hook"].as_str().filter(|_| value["role"] == "active") {
        line("promote hook", hook.to_string());
    }
    if value["promotion"].is_object() {
        line("promoted", format!("without a handover, at {}", text(&value["promotion"]["at"])));
        crate::promotion::loss::lines(&value["promotion"]["loss"]).into_iter().for_each(|lost| line("", lost));
    }
    if let Some(reason) = value["waiting_for_decision"]["reason"].as_str() {
        let answer = value["waiting_for_decision"]["answer"].as_str().map(|answer| format!(" ({answer})")).unwrap_or_default();
        line("waits", format!("for a decision{answer}: {reason}"));
    }
    if let Some(point) = value["rewound"].as_u64() {
        line("rewound", format!("to point {point}, where it stays: `coldspare resume` lets replication go on"));
    }
    let history = &value["history"];
    if history.is_object() {
        let oldest = text(&history["oldest"]);
        line("history", format!("{} points since {oldest}, {} bytes of {}", history["points"], history["bytes"], history["space_bytes"]));
    }
    if value["seal"]["state"] == "sealed" {
        let by_all = value["seal"]["seen_by_all"] == false;
        line(
            "sealed",
            if by_all { "for this daemon's own mount namespace only" } else { "only the receiver can write in the roots" }.into(),
        );
    }
    let foreign = &value["foreign_writes"];
    if let Some(total) = foreign["total"].as_u64() {
        line("foreign", format!("{total} paths that somebody else wrote"));
        for f in foreign["last"].as_array().into_iter().flatten().take(20) {
            let by = f["by"]["command"].as_str().map(|command| format!(", by {command}, process {}", f["by"]["pid"])).unwrap_or_default();
            line("", format!("{}: {} at {}{by}: {}", text(&f["path"]), text(&f["kind"]), text(&f["found"]), text(&f["state"])));
        }
    }
    let held = value["held_back"].as_array().map_or(0, Vec::len);
    line("held back", held.to_string());
    for p in value["held_back"].as_array().into_iter().flatten().take(20) {
        line("", format!("{}: {} ({})", text(&p["path"]), text(&p["kind"]), text(&p["detail"])));
    }
    let scrub = &value["scrub"];
    if scrub["days"].as_u64().is_some_and(|days| days > 0) {
        let last = &scrub["last"];
        let count = |pass: &Value| pass["problems"].as_array().map_or(0, Vec::len) as u64 + pass["problems_unlisted"].as_u64().unwrap_or(0);
        let found =
            if last.is_null() { "not yet over".into() } else { format!("{} problems, as of {}", count(last), text(&last["ended"])) };
        line("scrub", format!("{found}; every {} days", scrub["days"]));
        for pass in [last, &scrub["now"]] {
            pass["problems"].as_array().into_iter().flatten().take(20).for_each(|p| line("", text(p)));
        }
    }
    if value["guard"].is_object() {
        line("application", format!("{}, {} failed attempts", text(&value["guard"]["state"]), value["guard"]["attempts"]));
    }
    if value["trouble"].is_string() {
        line("trouble", text(&value["trouble"]));
    }
    out
}
