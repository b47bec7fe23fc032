//! What a repack costs on the wire: coldspare and rsync, each with a destination that has the old packs.
//!
//! The repository grows by pushes that are packs of their own, of a history that is made up, or of the first parents of
//! `--repository DIR`; each way of repacking starts from a copy of that.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::Settings;
use crate::pair::{Pair, RsyncDaemon, check_equal};
use crate::process::measure;
use crate::report::{Result, run};

/// The section that is this part.
pub(crate) const SECTION: &str = "repack";

/// How many pushes a repository grows by.
const PUSHES: usize = 40;
const FILES: u64 = 2_000;
/// Files that a commit changes.
const CHANGED: u64 = 30;

/// The ways of repacking.
const WAYS: [(&str, &[&str]); 4] = [
    ("repack -ad", &["repack", "-q", "-a", "-d"]),
    ("repack -ad, no bitmap", &["repack", "-q", "-a", "-d", "--no-write-bitmap-index"]),
    ("repack -d --geometric=2", &["repack", "-q", "-d", "--geometric=2", "--no-write-bitmap-index"]),
    ("repack -adf", &["repack", "-q", "-a", "-d", "-f", "--no-write-bitmap-index"]),
];
/// How a fork is repacked, and what it borrows from with it.
const WITH_FORK: (&str, &[&str]) =
    ("repack -adl, with a fork that borrows", &["repack", "-q", "-a", "-d", "-l", "--no-write-bitmap-index"]);
/// Pushes to the fork.
const FORK_PUSHES: usize = 20;

/// Measures it, if it was asked for.
pub(crate) fn measure_all(settings: &Settings, has_rsync: bool) -> Result<Option<Value>> {
    if !settings.wants(SECTION) {
        return Ok(None);
    }
    let dir = settings.passing_dir(SECTION)?;
    let grown = dir.path().join("grown");
    grow(&grown, settings.repository.as_deref(), settings.commits, dir.path())?;
    let fork = dir.path().join("fork");
    grow_fork(&fork, &grown, dir.path())?;
    let objects = run(git(&grown).args(["count-objects", "-v"]))?;
    println!("a repository of {PUSHES} pushes: {}\n", objects.lines().collect::<Vec<_>>().join(", "));
    println!(
        "| way | new files, MB | coldspare sent, MB | rsync sent, MB | ratio | coldspare, s | rsync, s |\n|---|---|---|---|---|---|---|"
    );
    let mut rows = Vec::new();
    let ways = WAYS.iter().map(|way| (way, None)).chain([(&WITH_FORK, Some(fork.as_path()))]).skip(settings.ways_skipped);
    for (no, ((way, args), fork)) in ways.enumerate() {
        let at = dir.path().join(no.to_string());
        let ours = one(&grown, fork, args, &at.join("coldspare"), |source, at| {
            let pair = Pair::make(source, at)?;
            let receiver = pair.receive()?;
            measure(&mut pair.send_once(), &receiver)?;
            Ok(Box::new(move || {
                let cost = measure(&mut pair.send_once(), &receiver)?;
                let told: Value = serde_json::from_str(&cost.stdout)?;
                check_equal(source, &pair.destination)?;
                Ok((told["bytes_sent"].as_f64().ok_or("no bytes_sent in the output of send")?, cost.seconds))
            }))
        })?;
        let peer = if has_rsync { Some(one(&grown, fork, args, &at.join("rsync"), rsync)?) } else { None };
        let (sent, seconds) = ours.cost;
        let ratio = peer.as_ref().map(|peer| sent / peer.cost.0);
        let shown = |value: Option<f64>, digits: usize| value.map_or("-".into(), |value| format!("{value:.digits$}"));
        println!(
            "| {way} | {:.1} | {:.2} | {} | {} | {seconds:.2} | {} |",
            ours.new_bytes / 1e6,
            sent / 1e6,
            shown(peer.as_ref().map(|p| p.cost.0 / 1e6), 1),
            shown(ratio, 4),
            shown(peer.as_ref().map(|p| p.cost.1), 2),
        );
        rows.push(json!({"way": way, "new_bytes": ours.new_bytes, "sent": sent, "seconds": seconds,
            "rsync_sent": peer.as_ref().map(|p| p.cost.0), "rsync_seconds": peer.as_ref().map(|p| p.cost.1), "ratio": ratio}));
    }
    println!();
    Ok(Some(json!({"home": "repack", "objects": objects, "rows": rows})))
}

/// What a way of repacking came to.
struct Repacked {
    /// Bytes of the files that are new.
    new_bytes: f64,
    /// Bytes sent, and seconds.
    cost: (f64, f64),
}

/// Sends what is left to be sent.
type Send<'a> = Box<dyn FnOnce() -> Result<(f64, f64)> + 'a>;

/// Copies the home, has `prepare` send it, repacks it, and has what is new sent.
fn one(
    grown: &Path,
    fork: Option<&Path>,
    args: &[&str],
    at: &Path,
    prepare: impl for<'a> FnOnce(&'a Path, &Path) -> Result<Send<'a>>,
) -> Result<Repacked> {
    let home = at.join("home");
    let repositories = home.join("shared/data/repositories");
    fs::create_dir_all(&repositories)?;
    let all: Vec<PathBuf> = [grown]
        .into_iter()
        .chain(fork)
        .enumerate()
        .map(|(no, from)| -> Result<PathBuf> {
            let to = repositories.join((no + 1).to_string());
            run(Command::new("cp").arg("-a").arg(from).arg(&to))?;
            Ok(to)
        })
        .collect::<Result<_>>()?;
    if let [parent, fork] = &all[..] {
        fs::write(fork.join("objects/info/alternates"), format!("{}\n", parent.join("objects").display()))?;
    }
    let packs = || -> Result<Vec<(PathBuf, u64)>> { Ok(all.iter().map(|at| packs(at)).collect::<Result<Vec<_>>>()?.concat()) };
    let send = prepare(&home, at)?;
    let before = packs()?;
    for repository in &all {
        run(git(repository).args(args))?;
    }
    let new = packs()?.into_iter().filter(|(name, _)| before.iter().all(|(old, _)| old != name));
    let new_bytes = new.map(|(_, bytes)| bytes as f64).sum();
    Ok(Repacked { new_bytes, cost: send()? })
}

fn rsync<'a>(source: &'a Path, at: &Path) -> Result<Send<'a>> {
    let peer = RsyncDaemon::start(at)?;
    peer.push(source)?;
    Ok(Box::new(move || peer.push(source)))
}

/// The files of all packs.
fn packs(repository: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(repository.join("objects/pack"))? {
        let entry = entry?;
        found.push((entry.path(), entry.metadata()?.len()));
    }
    Ok(found)
}

/// Makes a bare repository that takes each push as a pack.
pub(crate) fn grow(at: &Path, from: Option<&Path>, commits: usize, dir: &Path) -> Result<()> {
    run(Command::new("git").args(["init", "-q", "--bare", "-b", "main"]).arg(at))?;
    take_packs(at)?;
    let source = dir.join("source");
    let push = |commit: &str| run(git(&source).args(["push", "-q", "--force"]).arg(at).arg(format!("{commit}:refs/heads/main")));
    if let Some(from) = from {
        run(Command::new("git").args(["clone", "-q", "--bare"]).arg(from).arg(&source))?;
        let all = run(git(&source).args(["rev-list", "--first-parent", "--reverse", "HEAD"]))?;
        let all: Vec<&str> = all.lines().collect();
        for push_no in 1..=PUSHES {
            push(all[(all.len() * push_no / PUSHES).max(1) - 1])?;
        }
        return Ok(());
    }
    run(Command::new("git").args(["init", "-q", "--bare", "-b", "main"]).arg(&source))?;
    let mut history = History { state: crate::home::SEED, commits: 0, lines: vec![Vec::new(); FILES as usize] };
    for _ in 0..PUSHES {
        history.import(&source, commits)?;
        push("refs/heads/main")?;
    }
    Ok(())
}

/// Makes a fork that borrows the objects of `parent`, and takes pushes of its own.
fn grow_fork(at: &Path, parent: &Path, dir: &Path) -> Result<()> {
    run(Command::new("git").args(["clone", "-q", "--bare", "--shared"]).arg(parent).arg(at))?;
    take_packs(at)?;
    let source = dir.join("fork-source");
    run(Command::new("git").args(["clone", "-q", "--bare", "--shared"]).arg(parent).arg(&source))?;
    let mut history = History { state: crate::home::SEED + 1, commits: 1, lines: vec![Vec::new(); FILES as usize] };
    for _ in 0..FORK_PUSHES {
        history.import(&source, 10)?;
        run(git(&source).args(["push", "-q"]).arg(at).arg("refs/heads/main"))?;
    }
    Ok(())
}

/// Each push stays the pack that it was.
fn take_packs(at: &Path) -> Result<()> {
    for (name, value) in [("transfer.unpackLimit", "1"), ("gc.auto", "0"), ("receive.autogc", "false")] {
        run(git(at).args(["config", name, value]))?;
    }
    Ok(())
}

pub(crate) fn git(at: &Path) -> Command {
    let mut command = Command::new("git");
    command.arg("-C").arg(at).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
    command
}

/// A made-up history: text files, some lines of some of which change with each commit.
struct History {
    state: u64,
    commits: u64,
    lines: Vec<Vec<u64>>,
}

impl History {
    /// Adds commits to the branch `main`.
    fn import(&mut self, to: &Path, commits: usize) -> Result<()> {
        let mut import = git(to).args(["fast-import", "--quiet"]).stdin(Stdio::piped()).spawn()?;
        let mut stdin = import.stdin.take().ok_or("no standard input")?;
        for no in 0..commits {
            self.commit(no == 0, &mut stdin)?;
        }
        drop(stdin);
        if import.wait()?.success() { Ok(()) } else { Err("git fast-import failed".into()) }
    }

    /// Writes the next commit, for `git fast-import`, which has to be told what the first of a stream builds on.
    fn commit(&mut self, is_first: bool, out: &mut impl Write) -> Result<()> {
        self.commits += 1;
        writeln!(out, "commit refs/heads/main\ncommitter A <a@b.c> {} +0000\ndata 4\nnext", 1_767_225_600 + self.commits)?;
        if is_first && self.commits > 1 {
            writeln!(out, "from refs/heads/main^0")?;
        }
        let changed = if self.commits == 1 { FILES } else { CHANGED };
        for no in 0..changed {
            let file = if self.commits == 1 { no } else { self.next() % FILES };
            let (count, fresh) = (40 + self.next() % 160, self.next());
            let mut lines = std::mem::take(&mut self.lines[file as usize]);
            if lines.is_empty() {
                lines = (0..count).map(|_| self.next()).collect();
            }
            for change in 0..4 {
                let at = ((fresh >> (8 * change)) % lines.len() as u64) as usize;
                lines[at] = self.next();
            }
            let text: String =
                lines.iter().map(|line| format!("    let value_{:x} = compute({}, \"{line:016x}\");\n", line % 97, line % 1013)).collect();
            self.lines[file as usize] = lines;
            writeln!(out, "M 100644 inline src/module_{:02}/part_{file:04}.rs\ndata {}\n{text}", file % 40, text.len())?;
        }
        Ok(())
    }

    fn next(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state
    }
}
