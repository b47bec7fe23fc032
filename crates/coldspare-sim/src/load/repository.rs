//! Repositories of a load: pushed to, forked, collected, by git.

use std::collections::VecDeque;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Shape, taken};
use crate::Chance;

/// A bare repository, and a clone with commits that are still to be pushed to it.
#[derive(Debug)]
pub struct Pusher {
    clone: PathBuf,
    bare: PathBuf,
    commits: usize,
    file_bytes: usize,
    chance: Chance,
    /// Commits made so far.
    made: u64,
    /// What each of the next pushes pushes.
    ready: VecDeque<String>,
    tip: String,
}

impl Pusher {
    /// Makes both, with nothing pushed yet; `number` tells the pushers of one load apart.
    ///
    /// # Errors
    /// `AlreadyExists`: one of both is there. Others: git failed.
    pub fn new(clone: &Path, bare: &Path, shape: &Shape, number: u64) -> io::Result<Pusher> {
        for at in [bare, clone] {
            make(at)?;
            git(at, &["init", "-q", "--bare", "-b", "main"])?;
        }
        set_up(bare)?;
        let chance = Chance::new(shape.seed.wrapping_mul(0x1_0000_0001).wrapping_add(number));
        let (clone, bare, commits, file_bytes) = (clone.into(), bare.into(), shape.commits, shape.file_bytes);
        let mut pusher = Pusher { clone, bare, commits, file_bytes, chance, made: 0, ready: VecDeque::new(), tip: String::new() };
        pusher.make_ready()?;
        Ok(pusher)
    }

    /// Pushes the next commits; the commit that is the tip now.
    pub fn push(&mut self) -> io::Result<&str> {
        let next = self.next()?;
        self.push_to(&self.bare, &next)?;
        self.ready.pop_front();
        self.tip = next;
        Ok(&self.tip)
    }

    /// Makes a fork that borrows all objects, and pushes to it what will be pushed here next.
    ///
    /// # Errors
    /// `AlreadyExists`: there is something. Others: git failed.
    pub(super) fn fork(&mut self, fork: &Path) -> io::Result<()> {
        let next = self.next()?;
        make(fork)?;
        let bare = self.bare.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        git(fork, &["clone", "-q", "--bare", "--shared", bare, "."])?;
        set_up(fork)?;
        self.push_to(fork, &next)
    }

    /// The repository that is pushed to.
    pub fn bare(&self) -> &Path {
        &self.bare
    }

    /// The file of the reference that is pushed to, until git packs it.
    pub fn reference(&self) -> PathBuf {
        self.bare.join("refs/heads/main")
    }

    /// What was pushed last; empty before the first push.
    pub fn tip(&self) -> &str {
        &self.tip
    }

    fn push_to(&self, bare: &Path, commit: &str) -> io::Result<()> {
        let bare = bare.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        git(&self.clone, &["push", "-q", bare, &format!("{commit}:refs/heads/main")])
    }

    fn next(&mut self) -> io::Result<String> {
        if self.ready.is_empty() {
            self.make_ready()?;
        }
        self.ready.front().cloned().ok_or_else(|| io::Error::other("git made no commits"))
    }

    /// Makes the commits of the next pushes, each with a file of its own.
    fn make_ready(&mut self) -> io::Result<()> {
        let marks = self.clone.join("marks");
        let mut import = command(&self.clone);
        import.args(["fast-import", "--quiet"]).arg(format!("--export-marks={}", marks.display()));
        let mut import = import.stdin(Stdio::piped()).spawn()?;
        let mut pipe = io::BufWriter::new(import.stdin.take().ok_or(io::ErrorKind::BrokenPipe)?);
        for mark in 1..=AT_ONCE * self.commits {
            writeln!(pipe, "commit refs/heads/main\nmark :{mark}\ncommitter A <a@b.c> {} +0000\ndata 3\nfix", FIRST_COMMIT_S + self.made)?;
            if mark == 1 && self.made > 0 {
                writeln!(pipe, "from refs/heads/main^0")?;
            }
            let text = self.text();
            write!(pipe, "M 100644 inline src/{}/{}.txt\ndata {}\n{text}\n", self.made % 16, self.made % 64, text.len())?;
            self.made += 1;
        }
        pipe.flush()?;
        drop(pipe);
        if !import.wait()?.success() {
            return Err(io::Error::other(format!("git fast-import failed in {}", self.clone.display())));
        }
        let mut names = vec![String::new(); AT_ONCE * self.commits];
        for line in fs::read_to_string(&marks)?.lines() {
            let of_mark = line.trim_start_matches(':').split_once(' ').and_then(|(mark, name)| Some((mark.parse::<usize>().ok()?, name)));
            let Some((place, name)) = of_mark.and_then(|(mark, name)| Some((names.get_mut(mark.checked_sub(1)?)?, name))) else {
                return Err(io::Error::other(format!("{line:?} is no mark")));
            };
            *place = name.into();
        }
        self.ready.extend(names.into_iter().skip(self.commits - 1).step_by(self.commits));
        Ok(())
    }

    /// Lines of text, of which none comes twice.
    fn text(&mut self) -> String {
        let mut text = String::with_capacity(self.file_bytes + LINE);
        while text.len() < self.file_bytes {
            text.push_str(&format!("let value = compute({:016x});\n", self.chance.bits()));
        }
        text.truncate(self.file_bytes);
        text
    }
}

/// Packs the references of a repository and puts all its objects in one pack, as an application's maintenance does; the
/// bytes of its packs afterwards.
///
/// What others borrow stays: a load's repositories only grow.
pub(super) fn collect(bare: &Path) -> io::Result<u64> {
    git(bare, &["pack-refs", "--all"])?;
    git(bare, &["repack", "-q", "-a", "-d", "-l"])?;
    let mut bytes = 0;
    for entry in fs::read_dir(bare.join("objects/pack"))? {
        // A push may put a pack there and take it away while this looks.
        bytes += entry?.metadata().map_or(0, |meta| meta.len());
    }
    Ok(bytes)
}

/// Makes a folder, and those above it; it must not be there.
fn make(at: &Path) -> io::Result<()> {
    fs::create_dir_all(at.parent().unwrap_or(at))?;
    fs::create_dir(at).map_err(|e| if e.kind() == io::ErrorKind::AlreadyExists { taken(at) } else { e })
}

/// As an application sets a repository up: git never collects by itself.
fn set_up(bare: &Path) -> io::Result<()> {
    [("gc.auto", "0"), ("receive.autogc", "false")].into_iter().try_for_each(|(name, value)| git(bare, &["config", name, value]))
}

fn git(at: &Path, args: &[&str]) -> io::Result<()> {
    let output = command(at).args(args).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("git {} in {}: {}: {}", args.join(" "), at.display(), output.status, said.trim())))
}

/// git as it is without anybody's settings.
fn command(at: &Path) -> Command {
    let mut command = Command::new("git");
    command.arg("-C").arg(at).env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1").env("LC_ALL", "C");
    command
}

/// Pushes whose commits are made at once.
const AT_ONCE: usize = 100;
/// The time of the first commit; each is a second later.
const FIRST_COMMIT_S: u64 = 1_767_225_600;
/// A line of a file.
const LINE: usize = 40;
