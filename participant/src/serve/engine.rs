//! The thread that makes answers: a step of each in turn, off the threads that serve connections.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::Limits;
use crate::ParticipantError;
use crate::answer::{Answer, Finish, Request, Reserve, Step};
use crate::runner::Runner;
use crate::sequences::Sequences;

/// Where requests go. When all of it is gone, the thread ends.
pub(super) struct Queue {
    jobs: mpsc::Sender<Job>,
    /// Requests that wait or are being answered.
    places: Arc<Semaphore>,
}

pub(super) enum Event {
    /// The first, unless nothing begins: so many of the prompt's tokens had been kept.
    Begun { cached_tokens: usize },
    Text {
        text: String,
        /// Of the answer so far.
        tokens: usize,
    },
    /// The last.
    Finished { finish: Finish, usage: Usage },
    /// The last as well.
    Failed(ParticipantError),
}

/// Tokens that an answer took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub prompt_tokens: usize,
    /// Of these.
    pub cached_tokens: usize,
    pub tokens: usize,
}

struct Job {
    request: Request,
    begun: Instant,
    events: mpsc::Sender<Event>,
    _place: OwnedSemaphorePermit,
}

struct Active<'a> {
    answer: Answer<'a>,
    job: Job,
}

/// Why a request is not taken.
pub(super) enum Refused {
    /// As many wait as may.
    Full,
    /// The thread is gone.
    Ended,
}

impl Queue {
    pub(super) fn start(runner: Runner, limits: Limits) -> Result<(Self, JoinHandle<()>), ParticipantError> {
        let all = limits.answers + limits.waiting;
        let (jobs, received) = mpsc::channel(all);
        let work = move || Worker { runner: &runner, jobs: received, limits }.run();
        let worker = std::thread::Builder::new().name("answers".into()).spawn(work);
        let worker = worker.map_err(|error| ParticipantError::Usage(format!("failed to start a thread: {error}")))?;
        Ok((Self { jobs, places: Arc::new(Semaphore::new(all)) }, worker))
    }

    /// A place in the queue, for as long as it is held.
    pub(super) fn place(&self) -> Result<OwnedSemaphorePermit, Refused> {
        self.places.clone().try_acquire_owned().map_err(|_| Refused::Full)
    }

    pub(super) fn ask(
        &self,
        place: OwnedSemaphorePermit,
        request: Request,
        begun: Instant,
    ) -> Result<mpsc::Receiver<Event>, Refused> {
        // A token has an event at most: the thread never waits for who reads slowly.
        let (events, received) = mpsc::channel(request.tokens_max + 5);
        let job = Job { request, begun, events, _place: place };
        self.jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Refused::Full,
            mpsc::error::TrySendError::Closed(_) => Refused::Ended,
        })?;
        Ok(received)
    }
}

struct Worker<'a> {
    runner: &'a Runner,
    jobs: mpsc::Receiver<Job>,
    limits: Limits,
}

impl Worker<'_> {
    fn run(self) {
        let Self { runner, mut jobs, limits } = self;
        let (mut waiting, mut active) = (VecDeque::new(), VecDeque::new());
        let mut reserve = Reserve::default();
        let mut sequences = Sequences::new(limits.sequences);
        loop {
            if waiting.is_empty() && active.is_empty() {
                match jobs.blocking_recv() {
                    Some(job) => waiting.push_back(job),
                    None => return,
                }
            }
            while let Ok(job) = jobs.try_recv() {
                waiting.push_back(job);
            }
            end_due(&mut waiting, &mut active, &mut reserve, &mut sequences);
            while active.len() < limits.answers
                && let Some(job) = waiting.pop_front()
            {
                let lent = active.len();
                active.extend(begin(runner, job, reserve, &mut sequences, lent));
            }
            // Who has a deadline and nothing yet, and could have, goes before who has something.
            let hurried = active.iter().enumerate().filter(|(_, turn)| turn.answer.begins_with_this_step());
            let hurried = hurried.filter_map(|(at, turn)| Some((turn.answer.due()?, at))).min();
            let Some(mut turn) = active.remove(hurried.map_or(0, |(_, at)| at)) else { continue };
            // Nobody else's answer comes too late because of this one's step.
            let others = active
                .iter()
                .filter_map(|other| other.answer.due())
                .chain(waiting.iter().filter_map(|job| job.due(reserve)));
            match turn.step(others.min(), &mut reserve) {
                After::More => active.push_back(turn),
                After::Over => turn.leave(&mut sequences),
                After::Lost => {}
            }
        }
    }
}

/// `lent` others have a sequence.
fn begin<'a>(
    runner: &'a Runner,
    job: Job,
    reserve: Reserve,
    sequences: &mut Sequences,
    lent: usize,
) -> Option<Active<'a>> {
    if job.events.is_closed() {
        return None;
    }
    match catch_unwind(AssertUnwindSafe(|| runner.answer_among(&job.request, job.due(reserve), sequences, lent))) {
        Ok(Ok(answer)) => {
            job.send(Event::Begun { cached_tokens: answer.cached_tokens });
            return Some(Active { answer, job });
        }
        Ok(Err(error)) => job.send(Event::Failed(error)),
        Err(_) => job.send(Event::Failed(ParticipantError::Panicked)),
    }
    None
}

/// Ends what has no time for another step.
fn end_due(
    waiting: &mut VecDeque<Job>,
    active: &mut VecDeque<Active<'_>>,
    reserve: &mut Reserve,
    sequences: &mut Sequences,
) {
    let now = Instant::now();
    waiting.retain(|job| {
        // Whoever has gone leaves its place to others.
        if job.events.is_closed() {
            return false;
        }
        let over = job.due(*reserve).is_some_and(|due| due <= now);
        if over {
            job.send(Event::Finished { finish: Finish::Deadline, usage: Usage::default() });
        }
        !over
    });
    for _ in 0..active.len() {
        let Some(mut turn) = active.pop_front() else { return };
        match turn.answer.due().filter(|due| *due <= now) {
            Some(due) => {
                reserve.ended(due, now);
                let step = turn.answer.finish(String::new(), Finish::Deadline);
                turn.tell(step);
                turn.leave(sequences);
            }
            None => active.push_back(turn),
        }
    }
}

impl Job {
    fn due(&self, reserve: Reserve) -> Option<Instant> {
        self.request.deadline.map(|deadline| reserve.due(self.begun, deadline))
    }

    fn send(&self, event: Event) {
        // Who has gone away hears nothing.
        let _ = self.events.try_send(event);
    }
}

/// What comes after a step.
enum After {
    More,
    Over,
    /// Nobody knows what is left.
    Lost,
}

impl Active<'_> {
    fn step(&mut self, others_due: Option<Instant>, reserve: &mut Reserve) -> After {
        if self.job.events.is_closed() {
            return After::Over;
        }
        match catch_unwind(AssertUnwindSafe(|| self.answer.step(others_due))) {
            Ok(Ok(step)) => {
                if let (Some(Finish::Deadline), Some(due)) = (step.finish, self.answer.due()) {
                    reserve.ended(due, Instant::now());
                }
                self.tell(step)
            }
            Ok(Err(error)) => {
                self.job.send(Event::Failed(error));
                After::Over
            }
            Err(_) => {
                self.job.send(Event::Failed(ParticipantError::Panicked));
                After::Lost
            }
        }
    }

    /// What it has read of its prompt may serve others.
    fn leave(self, sequences: &mut Sequences) {
        if let Some(kept) = self.answer.into_kept() {
            sequences.keep(kept);
        }
    }

    fn tell(&self, Step { text, finish }: Step) -> After {
        if !text.is_empty() {
            self.job.send(Event::Text { text, tokens: self.answer.tokens.len() });
        }
        if let Some(finish) = finish {
            let Answer { cached_tokens, tokens, .. } = &self.answer;
            let prompt_tokens = self.answer.prompt_tokens();
            let usage = Usage { prompt_tokens, cached_tokens: *cached_tokens, tokens: tokens.len() };
            self.job.send(Event::Finished { finish, usage });
            return After::Over;
        }
        After::More
    }
}
