// What people call a request (a turn of this page's own chat by its place, any other by the start of its id) and a stage.

const own = new Map();

export const nameTurn = (rid, name) => own.set(rid, name);

export function nameOf(rid) {
  if (own.has(rid)) return own.get(rid);
  const short = rid.replace(/^(chatcmpl|cmpl)-/, "");
  return short.length > 12 ? `${short.slice(0, 8)}…` : short;
}

const STAGES = {
  TOKENIZE: "reading",
  PREFILL_BOOTSTRAP: "for a decode node",
  PREFILL_TRANSFER_KV_CACHE: "giving",
  DECODE_BOOTSTRAP: "for a prefill node",
  DECODE_WAITING: "taking",
  DECODE_TRANSFERRED: "taken",
  PREFILL_WAITING: "waiting",
  LOADING: "loading",
  PREFILL_CHUNKED_FORWARD: "prompt (chunk)",
  PREFILL_FORWARD: "prompt",
  DECODE_LOOP: "generating",
  FINISHED: "ended",
};

export const stageOf = (stage) => STAGES[stage] ?? stage;
