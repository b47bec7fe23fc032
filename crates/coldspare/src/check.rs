//! `check`: is this host set up as coldspare needs it?

use std::path::Path;

use coldspare_core::control::Role;
use coldspare_os::{Disk, RealDisk};
use serde_json::json;

use crate::config::{Config, HookName, Profile, WatchMode};
use crate::exit::{Code, Outcome};
use crate::roots;
use crate::state::State;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Grade {
    Good,
    Warning,
    Bad,
}

impl Grade {
    fn word(self) -> &'static str {
        match self {
            Grade::Good => "ok",
            Grade::Warning => "warning",
            Grade::Bad => "error",
        }
    }
}

struct Finding {
    what: String,
    grade: Grade,
    detail: String,
}

/// Runs `check`; exit code 0 without errors (warnings may be there), 2 with.
///
/// # Errors
/// `Usage` when the configuration itself can't be read.
pub(crate) fn run(config_path: &Path, json: bool) -> Outcome {
    let config = Config::load(config_path)?;
    let mut findings = vec![Finding { what: "configuration".into(), grade: Grade::Good, detail: config_path.display().to_string() }];
    examine(&config, &mut findings);
    examine_hooks(&config, &mut findings);
    let bad = findings.iter().any(|f| f.grade == Grade::Bad);
    if json {
        let list = findings.iter().map(|f| json!({"what": f.what, "grade": f.grade.word(), "detail": f.detail}));
        println!("{}", json!({"ok": !bad, "build": crate::BUILD, "findings": list.collect::<Vec<_>>()}));
    } else {
        for f in &findings {
            println!("{:<8} {}: {}", f.grade.word(), f.what, f.detail);
        }
    }
    Ok(if bad { Code::Usage } else { Code::Done })
}

/// The commands that would be run, and who could change them.
fn examine_hooks(config: &Config, findings: &mut Vec<Finding>) {
    let me = rustix::process::geteuid();
    let any = config.guard.clone().unwrap_or_default();
    for name in HookName::ALL {
        let Some(hook) = config.hooks.resolve(name, &any, &config.state) else { continue };
        let Some(program) = hook.command.first() else { continue };
        let wrong = coldspare_failover::hook::examine(Path::new(program), me.as_raw());
        let is_good = wrong.is_empty();
        let detail = if is_good { format!("{}, at most {} s", hook.command.join(" "), hook.limit.as_secs()) } else { wrong.join("; ") };
        findings.push(Finding { what: format!("hook {}", name.word()), grade: if is_good { Grade::Good } else { Grade::Bad }, detail });
    }
    let Some(guard) = &config.guard else { return };
    let mut warn = |detail: &str| findings.push(Finding { what: "guard".into(), grade: Grade::Warning, detail: detail.into() });
    if !me.is_root() {
        warn("not root: processes of other users can't be examined, so the application can't be proven dead");
    }
    if guard.pid_file.is_none() && guard.unit().is_none() && guard.search(vec![]).patterns.is_empty() {
        warn(
            "nothing tells the application's process, so one that has just begun looks like one that hangs: set guard.pid_file, unit or patterns",
        );
    }
    if config.hooks.resolve(HookName::Failover, guard, &config.state).is_none() {
        warn("hooks.failover isn't set: when all attempts failed people are told, and nothing else is done");
    } else if !guard.failover_fences && config.hooks.resolve(HookName::FenceSelf, guard, &config.state).is_none() {
        warn("hooks.fence_self isn't set: without proof of death there is no failover");
    }
}

fn examine(config: &Config, findings: &mut Vec<Finding>) {
    let mut say = |what: &str, grade, detail: String| findings.push(Finding { what: what.into(), grade, detail });
    match coldspare_os::openat2_works() {
        Ok(()) => say("kernel", Grade::Good, "openat2 works".into()),
        Err(e) => say("kernel", Grade::Bad, e.to_string()),
    }
    let state = State::at(&config.state);
    let record = match state.control() {
        Ok(record) => record,
        Err(e) => return say("node", Grade::Bad, e.message),
    };
    say("node", Grade::Good, format!("{} {}, cluster {}, epoch {}", record.role.word(), record.node, record.cluster, record.promised));
    match state.identity() {
        Ok(identity) => say("identity", Grade::Good, identity.key().to_string()),
        Err(e) => say("identity", Grade::Bad, e.message),
    }
    match (state.pins(), state.invitation()) {
        (Err(e), _) | (_, Err(e)) => say("pairing", Grade::Bad, e.message),
        (Ok(pins), Ok(open)) if record.role == Role::Standby => match (pins.first(), open) {
            (Some(pin), None) => say("pairing", Grade::Good, format!("paired with {pin}")),
            (Some(pin), Some(_)) => say("pairing", Grade::Warning, format!("paired with {pin}; a new invitation is open")),
            (None, Some(_)) => say("pairing", Grade::Warning, "an invitation is open, the active has not come yet".into()),
            (None, None) => say("pairing", Grade::Bad, "no active is paired; run `coldspare init standby` for an invitation".into()),
        },
        (Ok(pins), Ok(open)) => match (pins.first(), open) {
            (Some(pin), None) => say("pairing", Grade::Good, format!("paired with {pin}")),
            (Some(pin), Some(_)) => say("pairing", Grade::Warning, format!("invited by {pin}, not yet in contact")),
            (None, _) => say("pairing", Grade::Bad, "no standby is paired".into()),
        },
    }
    if record.role == Role::Active && config.peer.address.is_none() {
        say("peer", Grade::Bad, "[peer] address is missing".into());
    }
    let paths = match roots::resolve(config, record.cluster) {
        Ok(paths) => paths,
        Err(e) => return say("roots", Grade::Bad, e.message),
    };
    let disk = RealDisk::staying();
    let is_root = rustix::process::geteuid().is_root();
    for (root, path) in config.roots.iter().zip(&paths) {
        let what = format!("root {}", root.name);
        let examined = disk.open_root(path).and_then(|dir| {
            let control = disk.open_dir(&dir, coldspare_core::path::CONTROL_DIR)?;
            Ok((disk.stat_dir(&dir)?, disk.stat_dir(&control)?, disk.space(&dir)?))
        });
        let (own, control, space) = match examined {
            Ok(examined) => examined,
            Err(e) => {
                say(&what, Grade::Bad, format!("{}: {e}", path.display()));
                continue;
            }
        };
        if own.dev != control.dev {
            say(&what, Grade::Bad, format!("{}: .coldspare is on another filesystem", path.display()));
        }
        let room = format!("{}: {} MB and {} inodes free", path.display(), space.free_bytes >> 20, space.free_inodes);
        let is_scarce = space.free_bytes < 1 << 30 || space.free_inodes < 10_000;
        say(&what, if is_scarce { Grade::Warning } else { Grade::Good }, room);
        let me = rustix::process::geteuid().as_raw();
        if !is_root && own.uid != me {
            say(&what, Grade::Bad, format!("owned by {}, this user is {me}: owners can't be kept; run as root or as the owner", own.uid));
        } else if !is_root {
            say(&what, Grade::Warning, "not root: files of other owners can't be replicated".into());
        }
        if root.name == "home" && root.profile == Profile::None && path.join("shared/bitbucket.properties").exists() {
            say(&what, Grade::Warning, "looks like a Bitbucket home, but profile = \"bitbucket\" is not set".into());
        }
    }
    if record.role == Role::Active && config.send.watch != WatchMode::Scan {
        let read =
            |name: &str| std::fs::read_to_string(format!("/proc/sys/fs/inotify/{name}")).ok().and_then(|t| t.trim().parse::<u64>().ok());
        if let (Some(watches), Some(queue)) = (read("max_user_watches"), read("max_queued_events")) {
            let by_fanotify = match coldspare_os::fanotify::Fanotify::new() {
                Ok(_) => "fanotify is available".to_string(),
                Err(e) => format!("fanotify isn't available ({e}: it needs CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH)"),
            };
            say("watch", Grade::Good, format!("{by_fanotify}; inotify: up to {watches} folders, {queue} queued events"));
        }
    }
    match coldspare_transport::SocketBuffers::probe(config.tuning().socket_buffer_bytes) {
        Ok(buffers) => match buffers.advice() {
            Some(advice) => say("link", Grade::Warning, advice),
            None => say("link", Grade::Good, format!("{} bytes of socket buffers each way", buffers.asked_bytes)),
        },
        Err(e) => say("link", Grade::Bad, format!("no UDP socket can be made: {e}")),
    }
}
