// What people call a request: a turn of this page's own chat by its place, any other by the start of its id.

const own = new Map();

export const nameTurn = (rid, name) => own.set(rid, name);

export const nameOf = (rid) => own.get(rid) ?? (rid.length > 12 ? `${rid.slice(0, 10)}…` : rid);
