//! `export`: a copy of a point that can be written into, for a drill.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use coldspare_core::control::Role;
use coldspare_standby::{Exported, PointNo, StandbyError};
use serde_json::{Value, json};

use super::points::find;
use super::{Copy, Shared, open_copy_alone};
use crate::config::{Config, Root};
use crate::exit::{Code, Failure, Outcome};
use crate::socket::{self, Reply, Request};
use crate::state::State;

/// Runs `export`: asks the daemon, or opens the standby when none runs.
///
/// # Errors
/// `Usage` on an active, and for a folder that can't be used; `Differs` when there is no such point; `Damage`.
pub(crate) fn run(config_path: &Path, point: &str, dir: &Path, is_json: bool) -> Outcome {
    let config = Config::load(config_path)?;
    let state = State::at(&config.state);
    let record = state.control()?;
    if record.role != Role::Standby {
        return Err(Failure::usage(format!("this host is {}; points are those of the standby", record.role.word())));
    }
    let started = Instant::now();
    let dir = std::path::absolute(dir).map_err(|e| Failure::usage(format!("{}: {e}", dir.display())))?;
    let request = Request::Export { point: point.to_string(), dir: dir.clone() };
    let mut done = match socket::ask(&state.socket_path(), &request, None, |_| {})? {
        Some(done) => done,
        None => {
            let _lock = state.lock()?;
            export(&open_copy_alone(&config, &state, &record)?, &config.roots, point, &dir)?
        }
    };
    done["seconds"] = json!(seconds(started.elapsed()));
    if is_json {
        println!("{done}");
    } else {
        print!("{}", text(&done));
    }
    Ok(Code::Done)
}

fn seconds(elapsed: Duration) -> f64 {
    (elapsed.as_secs_f64() * 1000.0).round() / 1000.0
}

/// Writes the point that a person names below `dir`: each root into a folder of its name.
fn export(copy: &Copy, roots: &[Root], point: &str, dir: &Path) -> Result<Value, Failure> {
    let no = find(copy, point)?;
    let folders = make_folders(roots, dir)?;
    let exported = copy.export(no, &folders).map_err(|e| {
        let message = format!("{e}; what is in {} is a part of the copy: remove it", dir.display());
        match e {
            StandbyError::UnknownPoint(_) => Failure::refused(message),
            _ => Failure::damage(message),
        }
    })?;
    Ok(to_json(no, dir, exported))
}

fn make_folders(roots: &[Root], dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    let fail = |path: &Path, e: std::io::Error| Failure::usage(format!("{}: {e}", path.display()));
    // A folder of a root isn't touched.
    let real = match (dir.canonicalize(), dir.parent(), dir.file_name()) {
        (Ok(real), ..) => real,
        (Err(_), Some(above), Some(name)) => above.canonicalize().map_err(|e| fail(above, e))?.join(name),
        (Err(e), ..) => return Err(fail(dir, e)),
    };
    if let Some(root) = roots.iter().find(|root| root.path.canonicalize().is_ok_and(|path| real.starts_with(path))) {
        return Err(Failure::usage(format!("{} is in the root {:?}: a copy there would be taken for drift", dir.display(), root.name)));
    }
    if !real.exists() {
        std::fs::create_dir(&real).map_err(|e| fail(dir, e))?;
    }
    if std::fs::read_dir(&real).map_err(|e| fail(dir, e))?.next().is_some() {
        return Err(Failure::usage(format!("{} is not empty", dir.display())));
    }
    roots
        .iter()
        .map(|root| {
            let folder = real.join(&root.name);
            std::fs::create_dir(&folder).map_err(|e| fail(&folder, e))?;
            Ok(folder)
        })
        .collect()
}

fn to_json(no: PointNo, dir: &Path, exported: Exported) -> Value {
    let Exported { files, bytes, cloned, linked, copied } = exported;
    let dir = coldspare_core::path::escape(dir.as_os_str().as_encoded_bytes());
    json!({"point": no.0, "dir": dir, "files": files, "bytes": bytes, "cloned": cloned, "linked": linked, "copied": copied})
}

fn text(done: &Value) -> String {
    let dir = done["dir"].as_str().unwrap_or_default();
    let (files, bytes, point) = (&done["files"], &done["bytes"], &done["point"]);
    let (cloned, linked, copied) = (&done["cloned"], &done["linked"], &done["copied"]);
    let mut out = format!("point {point} is in {dir}: {files} files, {bytes} bytes in {} s\n", done["seconds"]);
    out.push_str(&format!("{cloned} files share blocks with the standby's, {copied} are copies"));
    out.push_str(&match linked.as_u64() {
        Some(0) => "\n".to_string(),
        _ => format!("; {linked} objects and packs ARE the standby's files: never write into them, or change their modes\n"),
    });
    out
}

impl Shared {
    /// Writes a point into a folder, while replication goes on.
    pub(super) async fn export(self: &Arc<Self>, point: String, dir: PathBuf) -> Reply {
        let roots = self.config.roots.clone();
        self.with_copy(move |copy| export(copy, &roots, &point, &dir)).await
    }
}
