//! coldspare's pair on one host, and the daemons of its peers.

use std::fs;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::Daemon;
use crate::report::{Result, program_version, run};

/// Both ends, installed and paired.
pub(crate) struct Pair {
    pub(crate) destination: PathBuf,
    active: PathBuf,
    standby: PathBuf,
    at: PathBuf,
}

impl Pair {
    /// Installs both ends in the folder `at`, with an empty standby.
    pub(crate) fn make(source: &Path, at: &Path) -> Result<Pair> {
        let destination = at.join("standby");
        fs::create_dir(&destination)?;
        let (standby, active) = (at.join("standby.toml"), at.join("active.toml"));
        let port = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let init = |role: &str, home: &Path, config: &Path| {
            let mut command = coldspare();
            command.args(["init", role, "--home"]).arg(home).arg("--config").arg(config);
            command
        };
        let invite = run(init("standby", &destination, &standby).args(["--listen", &format!("127.0.0.1:{port}")]))?;
        // The source keeps the mark of an earlier run's pair.
        let mark = source.join(".coldspare");
        if mark.exists() {
            fs::remove_dir_all(&mark)?;
        }
        run(init("active", source, &active).args(["--invite", invite.trim()]))?;
        Ok(Pair { destination, active, standby, at: at.into() })
    }

    /// Sets what the active's watch is.
    pub(crate) fn watch_by(&self, backend: &str) -> Result<()> {
        let text = fs::read_to_string(&self.active)?;
        let is_ours = |line: &str| line == "[send]" || line.starts_with("watch =");
        let rest: String = text.lines().filter(|line| !is_ours(line)).map(|line| format!("{line}\n")).collect();
        Ok(fs::write(&self.active, format!("{rest}[send]\nwatch = \"{backend}\"\n"))?)
    }

    pub(crate) fn receive(&self) -> Result<Daemon> {
        self.daemon("receive", &self.standby)
    }

    pub(crate) fn send(&self) -> Result<Daemon> {
        self.daemon("send", &self.active)
    }

    fn daemon(&self, command: &str, config: &Path) -> Result<Daemon> {
        let log = self.at.join(format!("{command}.log"));
        let is_ready = || fs::read_to_string(&log).is_ok_and(|text| text.lines().any(|line| line == "ready"));
        Ok(Daemon::start(coldspare().arg(command).arg("--config").arg(config), &log, is_ready)?)
    }

    pub(crate) fn send_once(&self) -> Command {
        self.on_active(&["send", "--once", "--json"])
    }

    /// A command for the active.
    pub(crate) fn on_active(&self, args: &[&str]) -> Command {
        let mut command = coldspare();
        command.args(args).arg("--config").arg(&self.active);
        command
    }
}

fn coldspare() -> Command {
    Command::new(env!("CARGO_BIN_EXE_coldspare"))
}

/// An rsync daemon that takes a tree.
pub(crate) struct RsyncDaemon {
    pub(crate) daemon: Daemon,
    pub(crate) destination: PathBuf,
    pub(crate) url: String,
}

impl RsyncDaemon {
    /// Starts one in the folder `at`, with an empty tree.
    pub(crate) fn start(at: &Path) -> Result<RsyncDaemon> {
        let destination = at.join("standby");
        fs::create_dir(&destination)?;
        let (config, log) = (at.join("rsyncd.conf"), at.join("rsyncd.log"));
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let owner = if rustix::process::geteuid().is_root() { "uid = root\ngid = root\n" } else { "" };
        let module = format!("use chroot = no\n{owner}[standby]\npath = {}\nread only = no\n", destination.display());
        fs::write(&config, module)?;
        let mut serve = Command::new("rsync");
        serve.args(["--daemon", "--no-detach", "--address=127.0.0.1", &format!("--port={port}")]);
        serve.arg(format!("--config={}", config.display()));
        let daemon = Daemon::start(&mut serve, &log, || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok())?;
        Ok(RsyncDaemon { daemon, destination, url: format!("rsync://127.0.0.1:{port}/standby/") })
    }
}

/// Fails unless both trees are equal in every entry, attribute and byte, by rsync's own judgement where it is there.
pub(crate) fn check_equal(source: &Path, destination: &Path) -> Result<()> {
    let mut command = Command::new("rsync");
    command.args(["-aHAXnc", "--delete", "--itemize-changes", "--exclude=/.coldspare"]);
    command.arg(format!("{}/", source.display())).arg(format!("{}/", destination.display()));
    if program_version("rsync").is_none() {
        run(Command::new("diff").arg("-r").arg("--exclude=.coldspare").arg(source).arg(destination))?;
        return Ok(());
    }
    let differences = run(&mut command)?;
    // The mark of the pair is made in the root and changes its time.
    let mut differences = differences.lines().filter(|line| !line.ends_with(" ./"));
    match differences.next() {
        None => Ok(()),
        Some(first) => Err(format!("the trees differ: {first} and {} more", differences.count()).into()),
    }
}

/// lsyncd with an rsync daemon to send to.
pub(crate) struct Lsyncd {
    pub(crate) destination: PathBuf,
    _lsyncd: Daemon,
    _rsync: RsyncDaemon,
}

impl Lsyncd {
    /// Starts both in the folder `at`; returns once the destination has all that `source` has.
    pub(crate) fn start(source: &Path, at: &Path) -> Result<Lsyncd> {
        let rsync = RsyncDaemon::start(at)?;
        let (config, log) = (at.join("lsyncd.lua"), at.join("lsyncd.log"));
        let text = format!(
            "settings {{ nodaemon = true }}\nsync {{ default.rsync, source = {source:?}, target = {:?}, delay = 1, delete = true,\n  \
             exclude = {{ '/.coldspare' }}, rsync = {{ archive = true, hard_links = true, acls = true, xattrs = true }} }}\n",
            rsync.url
        );
        fs::write(&config, text)?;
        // The first look is over once a file that was there at the start is there.
        let mark = "last-of-all";
        fs::write(source.join(mark), "")?;
        let there = rsync.destination.join(mark);
        let lsyncd = Daemon::start(Command::new("lsyncd").arg("-log").arg("all").arg(&config), &log, || there.exists())?;
        std::thread::sleep(std::time::Duration::from_secs(5));
        Ok(Lsyncd { destination: rsync.destination.clone(), _lsyncd: lsyncd, _rsync: rsync })
    }
}
