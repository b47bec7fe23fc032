//! Commands from the configuration or the command line: no shell, a time limit, output to the log.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Between two looks at whether it has ended.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Runs `command`, a program and its arguments, to its end; it is idempotent, and means what its exit code says.
///
/// # Errors
/// In words: it can't be started, failed, or didn't end in time, in which case it was killed.
pub(crate) fn run(what: &str, command: &[String], limit: Duration) -> Result<(), String> {
    let Some((program, arguments)) = command.split_first() else { return Err(format!("the {what} command is empty")) };
    tracing::info!(what, program, "a command of the configuration runs");
    // What it says goes where this program's own log goes.
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .spawn()
        .map_err(|e| format!("the {what} command {program:?} can't be started: {e}"))?;
    let started = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(format!("the {what} command {program:?} failed: {status}")),
            Ok(None) if started.elapsed() < limit => std::thread::sleep(LOOK_EVERY),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("the {what} command {program:?} did not end within {} s", limit.as_secs()));
            }
            Err(e) => return Err(format!("the {what} command {program:?}: {e}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(command: &[&str], expected: Result<(), &str>) {
        let command: Vec<String> = command.iter().map(ToString::to_string).collect();
        match (run("fence", &command, Duration::from_millis(500)), expected) {
            (Ok(()), Ok(())) => {}
            (Err(found), Err(expected)) => assert!(found.contains(expected), "{found}"),
            (found, expected) => panic!("{found:?} is not {expected:?}"),
        }
    }

    #[test]
    fn only_success_in_time_counts() {
        check(&["true"], Ok(()));
        check(&["false"], Err("failed"));
        check(&["/nonexistent/command"], Err("can't be started"));
        check(&["sleep", "60"], Err("did not end within"));
        check(&[], Err("empty"));
    }
}
