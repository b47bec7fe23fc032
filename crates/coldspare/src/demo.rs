//! `demo`: two hosts on this machine, with real git repositories and real daemons, and what they must get right.
//!
//! Nothing is simulated: the daemons are processes of this program that are really killed, git is the one of this host,
//! and each check fails the demonstration.

mod compare;
pub(crate) mod home;
pub(crate) mod host;

use std::fs;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use coldspare_core::exclude::BITBUCKET;
use serde_json::Value;

use crate::exit::{Code, Failure, Outcome};
use home::{git, git_command, push};
use host::{Host, INTERRUPTED, failed, free_port, wait_until};

/// Bytes of the push during which a daemon is killed.
const BIG_PUSH_BYTES: usize = 32 << 20;

/// Runs the demonstration in `dir`, or in a temporary folder, which is removed unless `keep`.
///
/// # Errors
/// `Differs`: a check did not hold. `Usage`: git is missing, or the folder can't be used.
pub(crate) fn run(dir: Option<PathBuf>, keep: bool) -> Outcome {
    let base = Base::new(dir, keep)?;
    stop_on_signals();
    let started = Instant::now();
    let outcome = Demo::new(&base.path).and_then(|mut demo| demo.play());
    match &outcome {
        Ok(()) => println!("\nall checks held, {:.1} seconds", started.elapsed().as_secs_f64()),
        Err(_) => println!("\na check failed after {:.1} seconds", started.elapsed().as_secs_f64()),
    }
    if keep {
        println!("kept: {}", base.path.display());
    }
    outcome.map(|()| Code::Done)
}

struct Demo {
    work: PathBuf,
    active: Host,
    standby: Host,
    lfs: String,
}

impl Demo {
    fn new(base: &Path) -> Result<Demo, Failure> {
        home::run(std::process::Command::new("git").arg("--version"))?;
        let work = base.join("work");
        home::make_dir(&work)?;
        let (active, standby) = (Host::new(base, "active", "send")?, Host::new(base, "standby", "receive")?);
        Ok(Demo { work, active, standby, lfs: String::new() })
    }

    fn play(&mut self) -> Result<(), Failure> {
        println!("{:<34}{:>9}  what happened", "step", "seconds");
        self.step("make a home", Demo::make_home)?;
        self.step("pair and start", Demo::pair)?;
        self.step("seed", Demo::seed)?;
        self.step("push while it follows", Demo::follow)?;
        self.step("checkpoint", Demo::checkpoint)?;
        self.step("repack, pack-refs", Demo::repack)?;
        self.step("kill -9 of receive in a push", Demo::kill_receiver)?;
        self.step("kill -9 of send in a push", Demo::kill_sender)?;
        self.step("compare both trees", Demo::compare)?;
        self.step("verify --deep", Demo::verify)?;
        self.step("flip one byte on the standby", Demo::flip)?;
        self.step("git on the standby alone", Demo::git_alone)
    }

    fn step(&mut self, name: &str, what: fn(&mut Demo) -> Result<String, Failure>) -> Result<(), Failure> {
        let started = Instant::now();
        let done = what(self);
        if INTERRUPTED.load(Ordering::Relaxed) {
            return Err(failed("interrupted"));
        }
        let text = done.as_ref().map_or("FAILED", String::as_str);
        println!("{name:<34}{:>9.2}  {text}", started.elapsed().as_secs_f64());
        done.map(|_| ()).map_err(|e| Failure { message: format!("{name}: {e}"), ..e })
    }

    fn make_home(&mut self) -> Result<String, Failure> {
        self.lfs = home::fill(&self.active.files, &self.work)?;
        Ok("4 repositories (one a fork), 1 in a data store, pull requests, LFS, attachments, plug-ins".into())
    }

    fn pair(&mut self) -> Result<String, Failure> {
        let invitation = self.standby.init("standby", &["--listen", &format!("127.0.0.1:{}", free_port()?)])?;
        self.active.init("active", &["--invite", invitation.trim()])?;
        self.standby.start()?;
        self.active.start()?;
        wait_until("the daemons are connected", || Ok(self.active.status().is_some_and(|s| s["connected"] == true)))?;
        Ok("two daemons, pinned to each other by key".into())
    }

    fn seed(&mut self) -> Result<String, Failure> {
        let done = self.active.checkpoint()?;
        let of = |status: Option<Value>, key: &str| status.and_then(|s| s[key].as_u64()).unwrap_or_default();
        let entries = of(self.standby.status(), "entries");
        let (read, sent) = (of(self.active.status(), "bytes_read"), of(self.active.status(), "bytes_sent"));
        Ok(format!("seq {}, {entries} entries, {} kB read, {} kB sent", done["seq"], read >> 10, sent >> 10))
    }

    fn follow(&mut self) -> Result<String, Failure> {
        let mut slowest = Duration::ZERO;
        for (n, id) in ["1", "2", "4", "1", "5"].into_iter().enumerate() {
            push(&self.work.join(id), &format!("pushed{n}"), &format!("push {n}\n"))?;
            let pushed = Instant::now();
            let (here, there) = self.pair_of(id)?;
            let tip = refs(&here)?;
            wait_until(&format!("the push to repository {id} is on the standby"), || Ok(refs(&there).is_ok_and(|r| r == tip)))?;
            slowest = slowest.max(pushed.elapsed());
        }
        Ok(format!("5 pushes, each on the standby without a command, the slowest after {} ms", slowest.as_millis()))
    }

    fn checkpoint(&mut self) -> Result<String, Failure> {
        push(&self.work.join("3"), "checkpointed", "before the checkpoint\n")?;
        let done = self.active.checkpoint()?;
        self.same_refs()?;
        Ok(format!("a push, then durable on the standby in {} s", done["seconds"]))
    }

    fn repack(&mut self) -> Result<String, Failure> {
        let (here, there) = self.pair_of("1")?;
        git(&here, &["repack", "-q", "-adb"])?;
        git(&here, &["pack-refs", "--all"])?;
        self.active.checkpoint()?;
        if there.join("refs/heads/main").exists() {
            return Err(failed(format!("{} shadows packed-refs", there.join("refs/heads/main").display())));
        }
        self.same_refs()?;
        git(&there, &["fsck", "--full"])?;
        Ok("one pack, packed-refs, no loose ref left to shadow it".into())
    }

    fn kill_receiver(&mut self) -> Result<String, Failure> {
        let amount = |demo: &Demo| demo.standby.status().map_or(0, |s| s["bytes_received"].as_u64().unwrap_or_default());
        let before = amount(self);
        let pushing = self.big_push("2")?;
        wait_until("a part of the push has arrived", || Ok(amount(self) > before + (BIG_PUSH_BYTES as u64 / 8)))?;
        let arrived = amount(self) - before;
        self.standby.kill();
        pushing.join()?;
        let tip = refs(&self.pair_of("2")?.0)?;
        let was_done = refs(&self.pair_of("2")?.1)? == tip;
        self.fsck_standby()?;
        self.standby.start()?;
        self.active.checkpoint()?;
        self.same_refs()?;
        let when = if was_done { "just after the push was applied" } else { "the push not yet applied" };
        Ok(format!("killed after {} of {} MB, {when}; fsck clean before and after", arrived >> 20, BIG_PUSH_BYTES >> 20))
    }

    fn kill_sender(&mut self) -> Result<String, Failure> {
        let amount = |demo: &Demo| demo.active.status().map_or(0, |s| s["bytes_sent"].as_u64().unwrap_or_default());
        let before = amount(self);
        let pushing = self.big_push("3")?;
        wait_until("a part of the push was sent", || Ok(amount(self) > before + (BIG_PUSH_BYTES as u64 / 8)))?;
        let sent = amount(self) - before;
        self.active.kill();
        pushing.join()?;
        self.active.start()?;
        self.active.checkpoint()?;
        self.same_refs()?;
        let read = self.active.status().map_or(0, |s| s["bytes_read"].as_u64().unwrap_or_default());
        // The push again, for its digest and to send it, and what else was changed in the two seconds before: nothing that
        // was unchanged for longer, such as the big push before it.
        if read > BIG_PUSH_BYTES as u64 * 5 / 2 {
            return Err(failed(format!("{read} bytes were read after the restart: unchanged content was read again")));
        }
        Ok(format!("killed after {} MB were sent; {} MB read after the restart", sent >> 20, read >> 20))
    }

    fn compare(&mut self) -> Result<String, Failure> {
        let (here, there) = (&self.active.files, &self.standby.files);
        let entries = compare::trees(&here.home, &there.home, BITBUCKET)? + compare::trees(&here.store, &there.store, &[])?;
        if let Some(path) = home::LEFT_OUT.iter().find(|path| there.home.join(path).exists()) {
            return Err(failed(format!("{path} is on the standby, but it must be left out")));
        }
        Ok(format!("{entries} entries equal in kind, mode, owner, time and bytes; caches, logs and locks left out"))
    }

    fn verify(&mut self) -> Result<String, Failure> {
        let (code, found) = self.standby.command(&["verify", "--deep"])?;
        if code != 0 {
            return Err(failed(format!("exit code {code}: {found}")));
        }
        Ok(format!(
            "{}: {} files, {} MB read",
            text(&found["verdict"]),
            found["checked_files"],
            found["checked_bytes"].as_u64().unwrap_or_default() >> 20
        ))
    }

    fn flip(&mut self) -> Result<String, Failure> {
        let object = self.standby.files.lfs_object(&self.lfs);
        let expected = object.strip_prefix(&self.standby.files.home).map_err(Failure::usage)?.display().to_string();
        flip_byte(&object)?;
        let (code, found) = self.standby.command(&["verify", "--deep"])?;
        flip_byte(&object)?;
        let named: Vec<&str> = found["problems"].as_array().into_iter().flatten().filter_map(|p| p["path"].as_str()).collect();
        if code != 1 || named != [expected.as_str()] {
            return Err(failed(format!("expected exit code 1 and {expected}, got {code} and {found}")));
        }
        let (code, found) = self.standby.command(&["verify", "--deep"])?;
        if code != 0 {
            return Err(failed(format!("after the byte was put back: exit code {code}: {found}")));
        }
        Ok("exit code 1, exactly that file named; put back: consistent".into())
    }

    /// Last: with the active gone, what is left must be whole.
    fn git_alone(&mut self) -> Result<String, Failure> {
        self.same_refs()?;
        self.active.kill();
        self.standby.kill();
        let Some(host) = self.active.files.home.parent() else { return Err(failed("the home has no parent")) };
        fs::rename(host, host.with_extension("gone")).map_err(|e| Failure::usage(format!("{}: {e}", host.display())))?;
        self.fsck_standby()?;
        let mut stash_refs = 0;
        for repository in self.standby.files.repositories() {
            for id in stash_ids(&repository)? {
                self.git_there(&repository, &["cat-file", "-e", &format!("{id}^{{commit}}")])?;
                stash_refs += 1;
            }
        }
        Ok(format!("fsck --full clean on all 5, refs were equal, {stash_refs} pull-request refs resolve"))
    }

    /// The repository `id` on both hosts.
    fn pair_of(&self, id: &str) -> Result<(PathBuf, PathBuf), Failure> {
        let find = |files: &home::Home| files.repositories().into_iter().find(|p| p.ends_with(id));
        find(&self.active.files).zip(find(&self.standby.files)).ok_or_else(|| failed(format!("no repository {id}")))
    }

    fn same_refs(&self) -> Result<(), Failure> {
        for (here, there) in self.active.files.repositories().iter().zip(self.standby.files.repositories()) {
            let (expected, found) = (refs(here)?, refs(&there)?);
            if expected != found {
                return Err(failed(format!("{}: refs differ from the active's:\n{found}\n{expected}", there.display())));
            }
        }
        Ok(())
    }

    fn fsck_standby(&self) -> Result<(), Failure> {
        self.standby.files.repositories().iter().try_for_each(|r| self.git_there(r, &["fsck", "--full"]).map(drop))
    }

    /// Runs git on the standby. Both hosts are one machine here, so the fork's `alternates` names the parent at its path
    /// on the active; on two hosts the homes are at the same path. The standby's copy of the parent is named beside it.
    fn git_there(&self, repository: &Path, args: &[&str]) -> Result<String, Failure> {
        let parent = self.standby.files.repository("1").join("objects");
        home::run(git_command(repository).env("GIT_ALTERNATE_OBJECT_DIRECTORIES", parent).args(args))
    }

    /// Pushes content that doesn't shrink, in the background.
    fn big_push(&self, id: &str) -> Result<Pushing, Failure> {
        let clone = self.work.join(id);
        let mut content = vec![0; BIG_PUSH_BYTES];
        aws_lc_rs::rand::fill(&mut content).map_err(|_| Failure::usage("the system gives no random numbers"))?;
        fs::write(clone.join("big"), content).map_err(|e| Failure::usage(format!("{}: {e}", clone.display())))?;
        git(&clone, &["config", "core.compression", "0"])?;
        git(&clone, &["add", "-A"])?;
        git(&clone, &["commit", "-q", "-m", "big"])?;
        Ok(Pushing(std::thread::spawn(move || git(&clone, &["push", "-q", "origin", "HEAD:main"]).map(drop))))
    }
}

struct Pushing(std::thread::JoinHandle<Result<(), Failure>>);

impl Pushing {
    fn join(self) -> Result<(), Failure> {
        self.0.join().unwrap_or_else(|_| Err(failed("the push panicked")))
    }
}

/// All refs that git knows in a repository.
fn refs(repository: &Path) -> Result<String, Failure> {
    git(repository, &["for-each-ref"])
}

/// What the refs outside git's own namespace name.
fn stash_ids(repository: &Path) -> Result<Vec<String>, Failure> {
    let read = |name: &str| {
        let path = repository.join(name);
        fs::read_to_string(&path).map_err(|e| failed(format!("{}: {e}", path.display())))
    };
    let packed = read("stash-packed-refs")?;
    let packed = packed.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.split(' ').next()).map(String::from);
    Ok(packed.chain([read("stash-refs/pull-requests/1/from")?.trim().to_string()]).collect())
}

/// Flips a bit in the middle of a file, which keeps its time of modification. Twice restores the file.
fn flip_byte(path: &Path) -> Result<(), Failure> {
    let flip = || -> std::io::Result<()> {
        let file = fs::OpenOptions::new().read(true).write(true).open(path)?;
        let meta = file.metadata()?;
        let (mut byte, middle) = ([0], meta.len() / 2);
        file.read_exact_at(&mut byte, middle)?;
        file.write_all_at(&[byte[0] ^ 1], middle)?;
        file.set_modified(meta.modified()?)
    };
    flip().map_err(|e| Failure::usage(format!("{}: {e}", path.display())))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The folder of the demonstration, removed at the end.
struct Base {
    path: PathBuf,
    remove: bool,
}

impl Base {
    fn new(dir: Option<PathBuf>, keep: bool) -> Result<Base, Failure> {
        let path = dir.unwrap_or_else(|| std::env::temp_dir().join(format!("coldspare-demo-{}", std::process::id())));
        let path = std::path::absolute(&path).map_err(Failure::usage)?;
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|e| Failure::usage(format!("{}: {e}; the folder of a demonstration is made anew", path.display())))?;
        Ok(Base { path, remove: !keep })
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        if self.remove {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Has SIGINT, SIGTERM and SIGHUP end every wait, so that what was started is killed and what was made is removed.
pub(crate) fn stop_on_signals() {
    std::thread::spawn(|| {
        let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let kinds = [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()];
            let [Ok(mut terminate), Ok(mut hangup), Ok(mut interrupt)] = kinds.map(signal) else { return };
            tokio::select! {
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
                _ = interrupt.recv() => {}
            }
            INTERRUPTED.store(true, Ordering::Relaxed);
        });
    });
}
