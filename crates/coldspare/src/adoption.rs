//! `adopt`: a standby takes what its roots hold for what it has, though no manifest says so.
//!
//! All of it is read, and a new manifest made of that. Nobody vouches for it: the standby says that it has nothing until an
//! active has named everything. Content that is there then isn't sent, and what the active doesn't have goes to quarantine.

use std::path::Path;

use coldspare_core::control::Role;
use serde_json::json;

use crate::active::{index_failure, open_scan};
use crate::config::Config;
use crate::demotion::{look, make_manifest};
use crate::exit::{Code, Failure, Outcome};
use crate::standby::Copy;
use crate::state::State;

/// Makes the manifest of this standby anew, of what its roots hold. Nothing in them is altered.
///
/// After a crash the manifest is the one that there was; the same call does it again.
///
/// Cost: every byte is read.
///
/// # Errors
/// `Usage`: this host isn't a standby, its daemon runs, or something writes the home; `Damage`: a store or the disk fails.
pub(crate) fn run(config_path: &Path, json: bool) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    let _lock = state.lock()?;
    let record = state.control()?;
    if record.role != Role::Standby {
        return Err(Failure::usage(format!("this host is the {}; only a standby adopts what its roots hold", record.role.word())));
    }
    // What an earlier call left of it isn't to be relied on.
    state.remove_store(&state.index_path())?;
    let capture = open_scan(&config, &state, &record)?;
    look(&capture)?;
    make_manifest(&state, &capture, None)?;
    let entries = capture.index.snapshot().and_then(|known| known.path_count()).map_err(index_failure)?;
    let (held, unlisted) = capture.held.list();
    let left_out = held.len() as u64 + unlisted;
    drop(capture);
    state.remove_store(&state.index_path())?;
    if json {
        println!("{}", json!({"entries": entries, "left_out": left_out}));
    } else {
        println!("{entries} entries are known now; start the receiver: the active names everything and sends what differs");
        if left_out > 0 {
            println!("{left_out} paths are damaged or can't be read: as if they weren't there");
        }
    }
    Ok(Code::Done)
}

/// Says what becomes of a tree that no manifest knows.
pub(crate) fn warn_of_unknown(config: &Config, copy: &Copy) {
    if copy.applied().is_some() || copy.entries().is_ok_and(|entries| entries > 0) {
        return;
    }
    let is_ours = |name: &std::ffi::OsStr| name == ".coldspare" || name == "lost+found";
    let holds_something = |root: &Path| std::fs::read_dir(root).is_ok_and(|all| all.flatten().any(|entry| !is_ours(&entry.file_name())));
    for root in config.roots.iter().filter(|root| holds_something(&root.path)) {
        tracing::warn!(
            root = %root.path.display(),
            "no manifest knows what it holds: with the first changeset that goes to quarantine, and all is sent. `coldspare adopt`, given before the \
             receiver is started, takes it for what the standby has"
        );
    }
}
