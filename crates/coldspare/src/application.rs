//! The application of this host: looking at it, stopping it for certain, starting it; and the hooks.
//!
//! Everything here blocks, with limits of time. What is done when is decided by the ladder, or by who runs a command.

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use coldspare_core::control::Role;
use coldspare_failover::dead::{self, Proof, Search};
use coldspare_failover::health::{self, Url};
use coldspare_failover::hook::{self, Hook, Ran};
use coldspare_failover::ladder::{Action, Outcome as Answer};
use coldspare_failover::observation::{DiskState, HandsOff, Health, Observation, Process, Verdict, Youth};
use serde_json::json;

use crate::config::{Config, Guard, HookName};
use crate::exit::{Code, Failure, Outcome};
use crate::guard;
use crate::roots::control_dir;
use crate::state::State;

/// The application of this host, and how to do things to it.
#[derive(Debug)]
pub(crate) struct Application {
    config: Config,
    guard: Guard,
    state: State,
    roots: Vec<PathBuf>,
    search: Search,
    status_url: Option<Url>,
}

/// Between two looks of a command that waits.
const LOOK_EVERY: Duration = Duration::from_millis(500);

impl Application {
    /// That of the configuration at `config_path`.
    ///
    /// # Errors
    /// `Usage`: the configuration can't be read, or has no section `[guard]`.
    pub(crate) fn load(config_path: &Path) -> Result<Application, Failure> {
        let config = Config::load(config_path)?;
        let Some(guard) = config.guard.clone() else {
            return Err(Failure::usage(format!(
                "{} says nothing of the application: add a section [guard], such as profile = \"bitbucket\"",
                config_path.display()
            )));
        };
        Application::of(config, guard)
    }

    /// As [`Application::load`], for who only runs hooks: they need no section `[guard]`.
    ///
    /// # Errors
    /// `Usage`: the configuration can't be read.
    pub(crate) fn load_hooks(config_path: &Path) -> Result<Application, Failure> {
        Application::for_hooks(Config::load(config_path)?)
    }

    fn for_hooks(config: Config) -> Result<Application, Failure> {
        let guard = config.guard.clone().unwrap_or_default();
        Application::of(config, guard)
    }

    fn of(config: Config, guard: Guard) -> Result<Application, Failure> {
        // A root that isn't there has nobody who uses it.
        let roots: Vec<PathBuf> = config.roots.iter().map(|r| r.path.canonicalize().unwrap_or_else(|_| r.path.clone())).collect();
        let status_url = guard.status_url().map(|url| url.parse::<Url>()).transpose().map_err(Failure::usage)?;
        let search = guard.search(roots.clone());
        let state = State::at(&config.state);
        Ok(Application { config, guard, state, roots, search, status_url })
    }

    /// Its section of the configuration.
    pub(crate) fn guard(&self) -> &Guard {
        &self.guard
    }

    /// The state folder of this node.
    pub(crate) fn state(&self) -> &State {
        &self.state
    }

    /// Looks once; `began` is now, on the caller's clock.
    ///
    /// Takes the status's limit, and that of the disk, at most.
    pub(crate) fn observe(&self, began: Duration) -> Observation {
        let health = self.health();
        let process = dead::main_process(&self.search).unwrap_or(Process::Unknown);
        Observation { began, health, process, disk: self.disk() }
    }

    /// Performs an action of the ladder.
    pub(crate) fn perform(&self, action: Action, variables: &[(String, String)]) -> Answer {
        let hook = |name| match self.run_hook(name, variables) {
            Ok(Some(ran)) => ran.check().map_or_else(Answer::Failed, |()| Answer::Done),
            Ok(None) => Answer::Failed(format!("hooks.{} isn't configured", name.word().replace('-', "_"))),
            Err(failure) => Answer::Failed(failure.message),
        };
        match action {
            Action::Stop => hook(HookName::Stop),
            Action::Start => match self.check_roots() {
                Ok(()) => hook(HookName::Start),
                Err(failure) => Answer::Failed(failure.message),
            },
            Action::FenceSelf => hook(HookName::FenceSelf),
            Action::Failover { .. } => hook(HookName::Failover),
            Action::Kill => {
                let asked = if self.hook(HookName::Kill).is_some() { hook(HookName::Kill) } else { Answer::Done };
                match dead::kill(&self.search) {
                    Ok(()) => asked,
                    Err(e) => Answer::Failed(e.to_string()),
                }
            }
            Action::Prove => match self.prove() {
                Ok(proof) if proof.is_dead() => Answer::Done,
                Ok(proof) => Answer::Failed(proof.to_string()),
                Err(failure) => Answer::Failed(failure.message),
            },
        }
    }

    /// Finds out who is alive.
    ///
    /// # Errors
    /// `Damage`: `/proc` can't be read; nothing is proven.
    pub(crate) fn prove(&self) -> Result<Proof, Failure> {
        dead::prove(&self.search).map_err(|e| Failure::damage(format!("/proc can't be read: {e}; nothing is known of the application")))
    }

    /// The command for `name`, if there is one.
    pub(crate) fn hook(&self, name: HookName) -> Option<Hook> {
        self.config.hooks.resolve(name, &self.guard, &self.config.state)
    }

    /// Runs the command for `name`; `None` when there is none.
    ///
    /// # Errors
    /// `Usage`: it can't be started.
    pub(crate) fn run_hook(&self, name: HookName, variables: &[(String, String)]) -> Result<Option<Ran>, Failure> {
        let Some(hook) = self.hook(name) else { return Ok(None) };
        let mut all = self.variables(name);
        all.extend(variables.iter().cloned());
        let program = hook.command.first().cloned().unwrap_or_default();
        let ran = hook::run(&hook, &all).map_err(|e| Failure::usage(format!("hook {}: {program}: {e}", name.word())))?;
        Ok(Some(ran))
    }

    /// Asks it to stop, waits, kills it, and says who is alive after all.
    ///
    /// # Errors
    /// As [`Application::prove`].
    pub(crate) fn end(&self) -> Result<Proof, Failure> {
        let limits = self.guard.limits();
        let until = Instant::now() + limits.stop_wait;
        if let Answer::Failed(why) = self.perform(Action::Stop, &[]) {
            tracing::warn!(error = %why, "the application could not be asked to stop");
        }
        let proof = self.wait_dead(until)?;
        if proof.is_dead() {
            return Ok(proof);
        }
        tracing::warn!(alive = %proof, "the application did not stop in time; it is killed");
        if let Answer::Failed(why) = self.perform(Action::Kill, &[]) {
            tracing::warn!(error = %why, "the application could not be killed");
        }
        self.wait_dead(Instant::now() + limits.kill_wait)
    }

    /// An application that is started over a folder where its home isn't mounted sets up a new one there.
    fn check_roots(&self) -> Result<(), Failure> {
        crate::roots::resolve(&self.config, self.state.control()?.cluster).map(drop)
    }

    fn wait_dead(&self, until: Instant) -> Result<Proof, Failure> {
        loop {
            let proof = self.prove()?;
            if proof.is_dead() || Instant::now() >= until {
                return Ok(proof);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn health(&self) -> Health {
        let limit = Duration::from_secs(self.guard.status_timeout_seconds);
        if self.config.hooks.has(HookName::Status) {
            return match self.run_hook(HookName::Status, &[]) {
                Ok(Some(ran)) => match (health::interpret(None, ran.output.trim().as_bytes()), ran.check()) {
                    // Without a state to read its exit code says all.
                    (Health::Failed(_), Ok(())) if ran.output.trim().is_empty() => Health::Running,
                    (Health::Failed(_), Err(why)) => Health::Failed(why),
                    (health, _) => health,
                },
                Ok(None) => Health::Failed("nothing tells its state".into()),
                Err(failure) => Health::Failed(failure.message),
            };
        }
        match &self.status_url {
            Some(url) => health::ask(url, limit),
            None => Health::Failed("nothing tells its state".into()),
        }
    }

    /// A write to each root, durable and in time, and room in it.
    fn disk(&self) -> DiskState {
        let limit = Duration::from_secs(self.guard.check_seconds.max(self.guard.status_timeout_seconds));
        let (tell, hear) = mpsc::channel();
        let (roots, min_free_mb) = (self.roots.clone(), self.guard.min_free_mb);
        // A disk that is gone holds whoever asks it: so somebody else asks.
        std::thread::spawn(move || tell.send(roots.iter().map(|root| probe(root, min_free_mb)).find(|s| *s != DiskState::Good)));
        match hear.recv_timeout(limit) {
            Ok(found) => found.unwrap_or(DiskState::Good),
            Err(_) => DiskState::Failed(format!("a root did not take a write within {} s", limit.as_secs())),
        }
    }

    fn variables(&self, name: HookName) -> Vec<(String, String)> {
        let mut all = vec![
            ("COLDSPARE_HOOK".to_string(), name.word().to_string()),
            ("COLDSPARE_CONFIG".into(), self.config.path.display().to_string()),
            ("COLDSPARE_STATE".into(), self.config.state.display().to_string()),
            ("COLDSPARE_HOME".into(), self.config.roots.first().map(|r| r.path.display().to_string()).unwrap_or_default()),
            ("COLDSPARE_PEER".into(), self.config.peer.address.clone().unwrap_or_default()),
        ];
        if let Ok(record) = self.state.control() {
            all.push(("COLDSPARE_ROLE".into(), record.role.word().into()));
            all.push(("COLDSPARE_EPOCH".into(), record.promised.0.to_string()));
            all.push(("COLDSPARE_NODE".into(), record.node.to_string()));
            all.push(("COLDSPARE_CLUSTER".into(), record.cluster.to_string()));
        }
        all
    }
}

/// Runs the command for `name` of a configuration; `None` when there is none.
///
/// # Errors
/// In words: it can't be started, failed, or took too long.
pub(crate) fn run_hook_of(config: &Config, name: HookName, variables: &[(String, String)]) -> Result<Option<()>, String> {
    let what = |why: String| format!("hooks.{}: {why}", name.word().replace('-', "_"));
    let application = Application::for_hooks(config.clone()).map_err(|failure| what(failure.message))?;
    match application.run_hook(name, variables).map_err(|failure| failure.message)? {
        Some(ran) => ran.check().map(Some).map_err(what),
        None => Ok(None),
    }
}

/// Runs the program and arguments that somebody named as the fence command.
///
/// # Errors
/// As [`run_hook_of`].
pub(crate) fn run_fence(config: &Config, command: &[String]) -> Result<(), String> {
    let hook = Hook { command: command.to_vec(), environment: Vec::new(), limit: FENCE_LIMIT, leftovers: hook::Leftovers::Killed };
    let application = Application::for_hooks(config.clone()).map_err(|failure| failure.message)?;
    let ran = hook::run(&hook, &application.variables(HookName::Fence)).map_err(|e| format!("{}: {e}", command.join(" ")))?;
    ran.check()
}

/// How long a fence command may take that was named on the command line.
const FENCE_LIMIT: Duration = Duration::from_secs(120);

/// A file without a name: nobody sees it, and nothing of it stays.
fn probe(root: &Path, min_free_mb: u64) -> DiskState {
    use rustix::io::Errno;
    let dir = control_dir(root);
    let written = std::fs::OpenOptions::new()
        .write(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::TMPFILE.bits().cast_signed())
        .open(&dir)
        .and_then(|mut file| std::io::Write::write_all(&mut file, b"coldspare").and_then(|()| file.sync_all()));
    let full = |why: String| DiskState::Scarce(why);
    match written.as_ref().map_err(|e| e.raw_os_error().map(Errno::from_raw_os_error)) {
        // Where a filesystem has no such files, or the root isn't coldspare's yet, room is all that can be looked at.
        Ok(()) | Err(Some(Errno::OPNOTSUPP | Errno::NOENT | Errno::ISDIR)) => {}
        Err(Some(Errno::NOSPC | Errno::DQUOT)) => return full(format!("{}: no space left", root.display())),
        Err(_) => {
            let why = written.err().map(|e| e.to_string()).unwrap_or_default();
            return DiskState::Failed(format!("{} takes no writes: {why}", root.display()));
        }
    }
    match rustix::fs::statvfs(root) {
        Ok(space) => {
            let free_mb = space.f_bavail.saturating_mul(space.f_frsize) >> 20;
            if free_mb < min_free_mb { full(format!("{}: {free_mb} MB free", root.display())) } else { DiskState::Good }
        }
        Err(e) => DiskState::Failed(format!("{}: {e}", root.display())),
    }
}

/// What `coldspare application` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    /// Starts it, and waits until it serves.
    Start,
    /// Stops it, for certain.
    Stop,
    /// Looks once.
    Status,
    /// Says who is alive.
    ProveDead,
}

/// Runs `application`.
///
/// # Errors
/// As the exit codes say.
pub(crate) fn run(config_path: &Path, verb: Verb, json: bool) -> Outcome {
    let application = Application::load(config_path)?;
    match verb {
        Verb::Status => status(&application, json),
        Verb::ProveDead => Ok(tell_proof(&application.prove()?, json)),
        Verb::Stop => {
            guard::refuse_beside_guard(application.state(), "would start the application again")?;
            Ok(tell_proof(&application.end()?, json))
        }
        Verb::Start => start(&application),
    }
}

/// Runs `hook`: the command's own output goes to ours.
///
/// # Errors
/// `Usage`: there is no such command, or it can't be started. `Differs`: it failed. `Unreachable`: it was out of time.
pub(crate) fn run_hook(config_path: &Path, name: HookName) -> Outcome {
    let application = Application::load_hooks(config_path)?;
    let Some(ran) = application.run_hook(name, &[])? else {
        return Err(Failure::usage(format!("hooks.{} isn't configured", name.word().replace('-', "_"))));
    };
    print!("{}", ran.output);
    match (ran.check(), ran.code()) {
        (Ok(()), _) => {
            if name == HookName::Promote {
                crate::promotion::steps::note_done(application.state())?;
            }
            Ok(Code::Done)
        }
        (Err(why), Some(_)) => Err(Failure { code: Code::Differs, message: format!("hook {}: {why}", name.word()), passes: false }),
        (Err(why), None) => Err(Failure::unreachable(format!("hook {}: {why}", name.word()))),
    }
}

fn status(application: &Application, json: bool) -> Outcome {
    let observation = application.observe(Duration::ZERO);
    let verdict = observation.judge(None, Youth::Within(application.guard.limits().start_limit));
    let (word, why) = match &verdict {
        Verdict::Healthy => ("healthy", String::new()),
        Verdict::HandsOff(off) => (off.word(), String::new()),
        Verdict::Unhealthy(why) => ("unhealthy", why.clone()),
    };
    let disk = match &observation.disk {
        DiskState::Good => "good".to_string(),
        DiskState::Scarce(why) | DiskState::Failed(why) => why.clone(),
    };
    let process = match observation.process {
        Process::Unknown => "unknown".to_string(),
        Process::Gone => "gone".into(),
        Process::Alive { age, .. } => format!("alive for {} s", age.as_secs()),
    };
    if json {
        println!("{}", json!({"state": word, "why": why, "process": process, "disk": disk}));
    } else {
        println!("{word}{}{why}; process: {process}; disk: {disk}", if why.is_empty() { "" } else { ": " });
    }
    Ok(match (&verdict, &observation.process) {
        (Verdict::Healthy, _) => Code::Done,
        // Who asks whether it is stopped has to tell this from trouble.
        (Verdict::Unhealthy(_), Process::Gone) => Code::Unreachable,
        _ => Code::Differs,
    })
}

fn start(application: &Application) -> Outcome {
    let record = application.state.control()?;
    if record.role != Role::Active {
        return Err(Failure::fenced(format!(
            "this host is {}, not the active; the application runs on the active only",
            record.role.word()
        )));
    }
    let limits = application.guard.limits();
    let until = Instant::now() + limits.start_limit;
    match application.health() {
        Health::Running => return Ok(Code::Done),
        Health::Failed(_) => {
            let proof = application.prove()?;
            if !proof.is_dead() {
                let message =
                    format!("something of the application is alive, it is not started: {proof}; `coldspare application stop` ends it");
                return Err(Failure { code: Code::Differs, message, passes: false });
            }
            if let Answer::Failed(why) = application.perform(Action::Start, &[]) {
                return Err(Failure::damage(format!("the application could not be started: {why}")));
            }
        }
        Health::Starting | Health::Maintenance | Health::FirstRun | Health::Unknown(_) => {}
    }
    loop {
        let observation = application.observe(Duration::ZERO);
        match observation.judge(None, Youth::Within(limits.start_limit)) {
            Verdict::Healthy => return Ok(Code::Done),
            Verdict::HandsOff(HandsOff::FirstRun) => {
                return Err(Failure::damage("the application shows its set-up page: wrong home, or wrong database"));
            }
            Verdict::Unhealthy(why) if Instant::now() >= until => {
                return Err(Failure::unreachable(format!("the application does not serve in time: {why}")));
            }
            Verdict::HandsOff(why) if Instant::now() >= until => {
                return Err(Failure::unreachable(format!("the application does not serve in time: it is {}", why.word())));
            }
            Verdict::HandsOff(_) | Verdict::Unhealthy(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}

fn tell_proof(proof: &Proof, json: bool) -> Code {
    if json {
        let one =
            |s: &dead::Survivor| json!({"pid": s.pid, "command": s.command, "application": s.kin == dead::Kin::Application, "why": s.why});
        let survivors: Vec<_> = proof.survivors.iter().map(one).collect();
        println!("{}", json!({"dead": proof.is_dead(), "alive": survivors, "doubts": proof.doubts}));
    } else if proof.is_dead() {
        println!("dead");
    } else {
        proof.survivors.iter().for_each(|s| println!("alive: {s}"));
        proof.doubts.iter().for_each(|d| println!("not proven: {d}"));
    }
    if proof.is_dead() { Code::Done } else { Code::Differs }
}
